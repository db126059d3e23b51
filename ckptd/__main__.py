"""`python -m ckptd` is `ckptd`."""

from ckptd.daemon.main import main

raise SystemExit(main())

"""What a virtual machine boots from: a kernel, an initramfs of our own, and an ext4 image.

The kernel is Debian 12's for clouds (6.1, cgroup version 2); of its modules only those for virtio
are kept, in an initramfs that loads them, mounts /dev/vda and goes on with systemd. The image is
made from the layers of roots.py and one more with the agent through which tests run commands.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.booted import roots
from tests.booted.cache import (
    Missing,
    build_step,
    cached,
    digest_of,
    new_log,
    prune,
    require,
)

AGENT = Path(__file__).with_name("guest_agent.py")
IMAGE_BYTES = 2 << 30  # sparse; some 450 MB are really there
KERNEL_SUITE = "bookworm"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
# In the order in which they need each other.
MODULES = [
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
    "virtio_blk", "virtio_console",
]  # fmt: skip
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t devtmpfs dev /dev
for module in %s; do /bin/busybox insmod /modules/$module.ko; done
until [ -b /dev/vda ]; do /bin/busybox usleep 10000; done
/bin/busybox mount -t ext4 -o rw /dev/vda /new
/bin/busybox mount --move /dev /new/dev
exec /bin/busybox switch_root /new /sbin/init
"""
AGENT_UNIT = """[Unit]
Description=Commands of the tests
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 -S /usr/lib/ckptd-tests/guest_agent.py
OOMScoreAdjust=-1000
StandardOutput=tty
TTYPath=/dev/console
[Install]
WantedBy=sysinit.target
"""
# The real dependency of the package is the image itself, whose name has the version in it.
DOWNLOAD = f"""
set -e
cd /run/kernel
apt-get -qq update
image=$(apt-cache depends {KERNEL_PACKAGE} |
  sed -n 's/^ *Depends: \\(linux-image-[^ ]*\\)$/\\1/p' | head -1)
apt-get -qq -o APT::Sandbox::User=root download "$image"
"""
IN_OVERLAY = """
set -e
mount -t tmpfs -o mode=0755 tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/tree"
mount -t overlay -o "lowerdir=$LOWER,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/tree"
"$@"
"""
NAMESPACE = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", IN_OVERLAY, "-"]


@dataclass(frozen=True)
class Kernel:
    """The two files that qemu loads."""

    image: Path
    initramfs: Path


@cache
def kernel() -> Kernel:
    """Return the kernel; downloaded the first time.

    Raises:
        Missing: No way to Debian's mirror, or a tool is not there.
    """
    require("busybox", package="busybox-static")
    require("cpio", "dpkg-deb", package="cpio dpkg")
    below = roots.tree(KERNEL_SUITE)
    require("systemd-nspawn", package="systemd-container")
    digest = digest_of(
        [below.name.encode(), DOWNLOAD.encode(), INIT.encode(), *map(str.encode, MODULES)]
    )
    directory = cached("kernel", digest, lambda out: _make_kernel(below, out))
    return Kernel(directory / "vmlinuz", directory / "initramfs")


def _make_kernel(below: Path, out: Path) -> None:
    log = new_log(out.stem)
    with tempfile.TemporaryDirectory(prefix="ckb-") as scratch:
        work, fetched, unpacked = (Path(scratch) / name for name in ("work", "fetched", "unpacked"))
        work.mkdir()
        fetched.mkdir()
        apt = Path(scratch) / "apt.conf"
        apt.write_text(_host_apt())
        nspawn = [
            "systemd-nspawn", "--quiet", f"--directory={work}/tree", "--register=no", "--keep-unit",
            "--as-pid2", "--pipe", "--resolv-conf=bind-host", f"--bind={fetched}:/run/kernel",
            f"--bind-ro={apt}:/run/apt.conf", "--setenv=APT_CONFIG=/run/apt.conf",
            f"--machine=ckptd-kernel-{os.getpid()}", "sh", "-c", DOWNLOAD,
        ]  # fmt: skip
        env = {**os.environ, "WORK": str(work), "LOWER": str(below)}
        build_step([*NAMESPACE, *nspawn], log, "download of a kernel from Debian's mirror", env=env)
        (package,) = fetched.glob("*.deb")
        build_step(["dpkg-deb", "-x", str(package), str(unpacked)], log, "unpacking the kernel")
        out.mkdir()
        (image,) = (unpacked / "boot").glob("vmlinuz-*")
        shutil.copy(image, out / "vmlinuz")
        _make_initramfs(unpacked, out / "initramfs")


def _host_apt() -> str:
    """Return how the host's apt reaches its mirrors, proxies for example."""
    if shutil.which("apt-config") is None:
        return ""
    dump = ["apt-config", "dump", "Acquire"]
    return subprocess.run(dump, capture_output=True, text=True, check=True).stdout


def _make_initramfs(unpacked: Path, out: Path) -> None:
    found = {path.name.partition(".")[0]: path for path in unpacked.rglob("*.ko*")}
    absent = [name for name in MODULES if name not in found]
    if absent:
        raise Missing(f"the kernel package has no modules {absent}")
    busybox = shutil.which("busybox")
    assert busybox, "checked by the caller"
    with tempfile.TemporaryDirectory(prefix="ckb-") as scratch:
        top = Path(scratch)
        for name in ("bin", "modules"):
            (top / name).mkdir()
        shutil.copy(busybox, top / "bin/busybox")
        for name in MODULES:
            shutil.copy(found[name], top / f"modules/{name}.ko")
        (top / "init").write_text(INIT % " ".join(MODULES))
        (top / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*")))
        packed = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"],
            cwd=top,
            input=names.encode(),
            capture_output=True,
            check=True,
        )
    out.write_bytes(gzip.compress(packed.stdout, 6, mtime=0))


@cache
def image(suite: str) -> Path:
    """Return the disk image of a suite with ckptd installed; never to be written to.

    Raises:
        Missing: See `roots.layers`.
    """
    require("mkfs.ext4", package="e2fsprogs")
    layers = roots.layers(suite)
    # This file says what is in the image, so that a changed word makes a new one.
    texts = [path.read_bytes() for path in (AGENT, Path(__file__))]
    digest = digest_of([layers[0].name.encode(), *texts])
    made = cached(f"image-{suite}", digest, lambda out: _make_image(layers, out))
    prune(f"image-{suite}")
    return made


def _make_image(layers: list[Path], out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ckb-") as scratch:
        work, agent = Path(scratch) / "work", Path(scratch) / "agent"
        work.mkdir()
        _write_agent(agent)
        with out.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        lower = ":".join(map(str, [agent, *layers]))
        env = {**os.environ, "WORK": str(work), "LOWER": lower}
        make = ["mkfs.ext4", "-q", "-F", "-L", "root", "-d", f"{work}/tree", str(out)]
        build_step([*NAMESPACE, *make], new_log(out.stem), "making a disk image", env=env)


def _write_agent(top: Path) -> None:
    files = {
        "usr/lib/ckptd-tests/guest_agent.py": AGENT.read_text(),
        "etc/systemd/system/ckptd-test-agent.service": AGENT_UNIT,
    }
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wanted = top / "etc/systemd/system/sysinit.target.wants/ckptd-test-agent.service"
    wanted.parent.mkdir(parents=True)
    wanted.symlink_to("../ckptd-test-agent.service")
    # There is no udev: what waits for a device, waits in vain. Hence no fstab either.
    (top / "etc/systemd/system/serial-getty@.service").symlink_to("/dev/null")
    top.chmod(0o755)

#!/usr/bin/env perl
# Census of Python files in Perl: lines and SHA-256 of each, by `ckpt pipe`. Sixteen modules share
# one write to the disk, so at most sixteen are done again, whatever is killed.
#
#   ckptctl submit -- examples/census.pl /usr/lib/python3.11 census.tsv
#
# The same in shell is census.sh; census.py (files alone, no helper) measures these and more.
use strict;
use warnings;
use Digest::SHA;
use File::Find;
use IO::Handle;
use IPC::Open2;
use JSON::PP;

my ($root, $result, $count) = @ARGV;
die "usage: census.pl DIRECTORY RESULT [COUNT]\n" unless defined $result;
my $pid = open2(my $answers, my $requests, 'ckpt', 'pipe');

sub ask {    # any number of requests at once; returns the last answer, once all are durable
    print {$requests} map { encode_json($_) . "\n" } @_;
    $requests->flush;
    my $answer;
    for (@_) {
        $answer = decode_json(<$answers> // die "ckpt pipe is gone\n");
        die "$answer->{error}{code}: $answer->{error}{message}\n" unless $answer->{ok};
    }
    return $answer;
}

sub modules {
    my %skipped = map { $_ => 1 } qw(site-packages dist-packages test tests __pycache__);
    my @found;
    my $look = sub { push @found, substr $File::Find::name, 1 + length $root if /\.py\z/ };
    find({ wanted => $look, preprocess => sub { grep { !$skipped{$_} } @_ } }, $root);
    @found = sort @found;
    return defined $count && $count < @found ? @found[0 .. $count - 1] : @found;
}

sub measure {
    my ($path) = @_;
    open my $file, '<:raw', $path or die "$path: $!\n";
    my $lines = () = <$file>;
    return { lines => $lines, sha256 => Digest::SHA->new(256)->addfile($path, 'b')->hexdigest };
}

ask({ op => 'hello', protocol => 1 });
my $done = ask({ op => 'items_done', results => JSON::PP::true })->{results};
my @modules = modules();
my @todo = grep { !$done->{$_} } @modules;
open my $begun, '>>', $ENV{CENSUS_BEGUN} // '/dev/null' or die "CENSUS_BEGUN: $!\n";
$begun->autoflush;

while (my @some = splice @todo, 0, 16) {
    for my $module (@some) {
        print {$begun} "$module\n";    # the side effect: how often was it begun?
        $done->{$module} = measure("$root/$module");
    }
    ask(map { { op => 'item', key => $_, status => 'pass', result => $done->{$_} } } @some);
    ask({ op => 'progress', done => @modules - @todo, total => scalar @modules });
    exit 75 if ask({ op => 'should_stop' })->{stop};
}

open my $file, '>', "$result.tmp" or die "$result.tmp: $!\n";
print {$file} join("\t", $_, $done->{$_}{lines}, $done->{$_}{sha256}), "\n" for @modules;
close $file and rename "$result.tmp", $result or die "$result: $!\n";
printf "%d modules\n", scalar @modules;
close $requests;
waitpid $pid, 0;

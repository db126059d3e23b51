#!/usr/bin/env perl
# Squares of 1 to N by `ckpt pipe`: every item is durable once its answer is read.
#
#   ckptctl submit -- examples/perl_resume.pl 1000
#
# Needs nothing but the core of Perl. The same twenty lines do it in any language that can
# start a process and read and write lines of JSON.
use strict;
use warnings;
use IO::Handle;
use IPC::Open2;
use JSON::PP;

my $total = shift // 100;
my $pid   = open2(my $answers, my $requests, 'ckpt', 'pipe');

sub ask {
    my (%request) = @_;
    print {$requests} encode_json(\%request), "\n";
    $requests->flush;
    my $line   = <$answers> // die "ckpt pipe is gone\n";
    my $answer = decode_json($line);
    die "$answer->{error}{code}: $answer->{error}{message}\n" unless $answer->{ok};
    return $answer;
}

my $hello   = ask(op => 'hello', protocol => 1);
my $results = ask(op => 'items_done', results => JSON::PP::true)->{results};
printf "resumed with %d items\n", scalar keys %$results if $hello->{resume};

# Level 1 and level 3 go together: what is large lies in files of a checkpoint.
my $lines = 0;
if ($hello->{last}) {
    open my $old, '<', "$hello->{last}/report" or die "report: $!";
    $lines++ while <$old>;
    print "the last report had $lines lines\n";
}

for my $n (1 .. $total) {
    next if exists $results->{$n};
    $results->{$n} = $n * $n;
    ask(op => 'item', key => "$n", status => 'pass', result => $results->{$n});
    ask(op => 'progress', done => $n, total => $total);
    if ($n % 25 == 0) {
        my $path = "$ENV{CKPTD_DIR}/report";
        open my $report, '>', $path or die "$path: $!";
        print {$report} "$_ $results->{$_}\n" for sort { $a <=> $b } keys %$results;
        close $report or die "$path: $!";
        ask(op => 'checkpoint', files => [$path], progress => [$n, $total]);
    }
    exit 75 if ask(op => 'should_stop')->{stop};
}

my $sum = 0;
$sum += $_ for values %$results;
print "sum of squares $sum\n";
close $requests;
waitpid $pid, 0;

// Command suite measures what Merlon promises (P1 to P14) in one go: it runs the
// benchmarks that are spread over the repository, takes medians, and says of each
// target what was measured and whether it is met.
//
//	suite                     everything, into integration/bench/results
//	suite -only P1,P7         some of it
//	suite -profile P6         where it goes: profiles, into integration/bench/results/profiles
//	suite -compare REV        the same benchmarks at REV and here, in turn, for benchstat
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "suite:", err)
		os.Exit(1)
	}
}

// options are what the command line says.
type options struct {
	root    string // of the repository
	out     string
	count   int
	only    map[string]bool
	compare string
	// missed: targets that are missed get profiles.
	missed bool
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("suite", flag.ContinueOnError)
	o := options{only: map[string]bool{}}
	flags.StringVar(&o.root, "C", ".", "the repository")
	flags.StringVar(&o.out, "out", filepath.Join("integration", "bench", "results"), "folder for the results")
	flags.IntVar(&o.count, "count", 5, "how often each benchmark is run; the median counts")
	flags.StringVar(&o.compare, "compare", "", "revision to compare with")
	flags.BoolVar(&o.missed, "profiles", true, "make profiles of the targets that are missed, by one more run of each")
	profiles := flags.String("profile", "", "targets of which only profiles are wanted, such as P6")
	only := flags.String("only", "", "targets, such as P1,P7; all without")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || o.count < 1 {
		return fmt.Errorf("unexpected %q or -count %d: see -h", flags.Args(), o.count)
	}
	for p := range strings.SplitSeq(*only+","+*profiles, ",") {
		if p != "" {
			o.only[p] = true
		}
	}
	for p := range o.only {
		if !known(p) {
			return fmt.Errorf("-only or -profile names %s: the targets are %s", p, strings.Join(names(), ", "))
		}
	}
	switch {
	case o.compare != "":
		return compare(ctx, o)
	case *profiles != "":
		return profileAll(ctx, o)
	}
	return measureAll(ctx, o)
}

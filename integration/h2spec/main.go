// Command h2spec holds an HTTP/2 server at ADDRESS, plaintext, to the rules of the
// protocol and prints what it fails, a line each: a module of its own, so that Merlon
// does not depend on the suite.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/fatih/color"
	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "h2spec:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: h2spec HOST:PORT")
	}
	host, text, err := net.SplitHostPort(args[0])
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return err
	}
	out := os.Stdout
	color.Output = io.Discard // with what follows, the suite's own report
	if os.Stdout, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
		return err
	}
	ran := 0
	for _, group := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		group.Test(&config.Config{Host: host, Port: port, Path: "/", Timeout: 5 * time.Second, MaxHeaderLen: 4000, Strict: true})
		ran += failures(out, group)
	}
	if ran == 0 {
		return fmt.Errorf("no test ran")
	}
	fmt.Fprintln(out, ran, "ran")
	return nil
}

// failures prints what failed, and counts what ran.
func failures(out io.Writer, group *spec.TestGroup) (ran int) {
	for _, t := range append(group.Tests, group.StrictTests...) {
		if t.Result == nil || t.Result.Skipped {
			continue
		}
		ran++
		if t.Result.Failed {
			fmt.Fprintf(out, "FAILED %s: %s\n", group.ID(), t.Desc)
		}
	}
	for _, g := range group.Groups {
		ran += failures(out, g)
	}
	return ran
}

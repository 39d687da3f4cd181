// Comparison with another revision: the same benchmarks there and here, in turn, so
// that the machine is the same for both; benchstat says what is noise.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// benchstat is pinned here: nothing else of the repository needs it.
const benchstat = "golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da"

// side is one of the two revisions.
type side struct {
	name, root string
	out        bytes.Buffer
	bins       map[string]string // package → test binary
}

// compare runs the benchmarks of the targets at both revisions. Tests that take
// minutes are left out.
func compare(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "merlon-compare")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tree := filepath.Join(dir, "base")
	if err := command(ctx, o.root, "git", "worktree", "add", "--quiet", "--detach", tree, o.compare); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, command(context.WithoutCancel(ctx), o.root, "git", "worktree", "remove", "--force", tree))
	}()
	var sources []source
	for _, s := range wanted(o.only) {
		if s.test == "" && !s.once && s.missing() == "" {
			sources = append(sources, s)
		}
	}
	sides := []*side{{name: "base", root: tree, bins: map[string]string{}}, {name: "here", root: o.root, bins: map[string]string{}}}
	for _, at := range sides {
		if err := at.build(ctx, dir, sources); err != nil {
			return err
		}
	}
	for round := range o.count {
		for _, s := range sources {
			for _, at := range sides {
				fmt.Fprintf(os.Stderr, "%s round %d of %d, %s: %s\n", time.Now().Format(time.TimeOnly), round+1, o.count, at.name, s.key())
				if err := at.run(ctx, s); err != nil {
					return err
				}
			}
		}
	}
	stat := []string{"run", benchstat}
	for _, at := range sides {
		path := filepath.Join(dir, at.name+".txt")
		if err := os.WriteFile(path, at.out.Bytes(), 0o600); err != nil {
			return err
		}
		stat = append(stat, path)
	}
	return command(ctx, dir, "go", stat...)
}

// build compiles the tests of all packages once, but those that the revision has not.
func (at *side) build(ctx context.Context, dir string, sources []source) error {
	for _, s := range sources {
		if _, err := os.Stat(filepath.Join(at.root, s.pkg)); at.bins[s.pkg] != "" || errors.Is(err, os.ErrNotExist) {
			continue
		}
		bin := filepath.Join(dir, at.name+"-"+strings.ReplaceAll(s.pkg, "/", "-")+".test")
		if err := command(ctx, filepath.Join(at.root, s.pkg), "go", "test", "-c", "-o", bin, "."); err != nil {
			return fmt.Errorf("%s: %w", at.name, err)
		}
		at.bins[s.pkg] = bin
	}
	return nil
}

// run goes on where a benchmark is not known at a revision: benchstat has it on one
// side then.
func (at *side) run(ctx context.Context, s source) error {
	if at.bins[s.pkg] == "" {
		return nil
	}
	cmd := exec.CommandContext(ctx, at.bins[s.pkg], s.args("test.")...)
	cmd.Dir, cmd.Env = filepath.Join(at.root, s.pkg), append(os.Environ(), s.env...)
	out, err := s.output(cmd)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n%s\n", at.name, s.key(), err, tail(string(out), 2000))
	}
	at.out.Write(out)
	return nil
}

func command(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return nil
}

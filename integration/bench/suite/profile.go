// Profiles: of a target that is missed, where CPU and memory went, as the top of what
// pprof says of this benchmark's process and of each of ours that it has started.

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"merlon.dev/integration/measure"
)

// profileAll makes the profiles of targets by name, without measuring anything.
func profileAll(ctx context.Context, o options) error {
	for _, p := range names() {
		if !o.only[p] {
			continue
		}
		path, err := o.profile(ctx, p, wanted(map[string]bool{p: true}))
		if err != nil {
			return err
		}
		fmt.Println(filepath.Join(o.out, path))
	}
	return nil
}

// profileMissed makes those of the targets that were missed, and points to them.
func (r *results) profileMissed(ctx context.Context, o options) error {
	missed := make(map[string][]source)
	for i, t := range r.targets {
		if !strings.HasPrefix(r.Lines[i].Met, missedMark) || t.stretch {
			continue
		}
		if t.source.fleet && !o.only[t.p] {
			r.Lines[i].Profile = "../../scale/README.md" // it takes an hour, and says why itself
			continue
		}
		r.Lines[i].Profile = profileOf(t.p)
		if !slices.ContainsFunc(missed[t.p], func(s source) bool { return s.key() == t.source.key() }) {
			missed[t.p] = append(missed[t.p], t.source)
		}
	}
	for _, p := range names() {
		if len(missed[p]) == 0 {
			continue
		}
		if _, err := o.profile(ctx, p, missed[p]); err != nil {
			return err
		}
	}
	return nil
}

// profileOf is the file for a target, in the folder for results.
func profileOf(p string) string { return filepath.Join("profiles", p+".txt") }

// profile runs the sources of a target once more, with profiles.
func (o options) profile(ctx context.Context, p string, all []source) (path string, err error) {
	var text bytes.Buffer
	fmt.Fprintf(&text, "%s: where it goes. %v\n", p, measure.Here(o.root))
	for _, s := range all {
		if s.missing() != "" {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s profile of %s: %s\n", time.Now().Format(time.TimeOnly), p, s.key())
		if err := s.profile(ctx, o.root, &text); err != nil {
			return "", fmt.Errorf("profile %s: %w", s.key(), err)
		}
	}
	path = profileOf(p)
	if err := os.MkdirAll(filepath.Join(o.out, "profiles"), 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(filepath.Join(o.out, path), text.Bytes(), 0o644)
}

func (s source) profile(ctx context.Context, root string, to *bytes.Buffer) error {
	dir, err := os.MkdirTemp("", "merlon-profiles")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s.env = append(slices.Clone(s.env), "MERLON_PROFILES="+dir)
	if out, err := s.run(ctx, root, "-cpuprofile="+filepath.Join(dir, "test.cpu"), "-memprofile="+filepath.Join(dir, "test.heap"), "-o="+filepath.Join(dir, "test.bin")); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(string(out), 2000))
	}
	processes, err := filepath.Glob(filepath.Join(dir, "*.heap")) // those that have come to the end of theirs
	if err != nil {
		return err
	}
	for _, heap := range processes {
		name := strings.TrimSuffix(heap, ".heap")
		fmt.Fprintf(to, "\n== %s: %s\n", s.key(), filepath.Base(name))
		for _, view := range []struct{ what, index, file string }{
			{"CPU", "cpu", name + ".cpu"},
			{"allocations", "alloc_objects", heap},
			{"memory at the end", "inuse_space", heap},
		} {
			cmd := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-nodecount=25", "-sample_index="+view.index, view.file)
			top, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("go tool pprof of %s: %w", view.file, err)
			}
			fmt.Fprintf(to, "\n-- %s\n%s", view.what, top)
		}
	}
	return nil
}

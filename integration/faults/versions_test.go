package faults_test

// R14: versions that follow each other, and go back, in use.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/stage"
)

// upgrade is R14. There is no release yet, so the versions before are commits.
func upgrade(r *run) {
	setup := faults.Setup{}
	versions := []string{""}
	if r.full {
		commits := env("MERLON_FAULTS_PREVIOUS")
		if commits == "" {
			commits = "HEAD~20,HEAD~50"
		}
		versions = nil
		before := []string{"merlon-ca"}
		for commit := range strings.SplitSeq(commits, ",") {
			old := buildAt(r, commit)
			setup.CA, setup.Agent = "merlon-ca-"+old, "merlon-agent-"+old // the last is what it begins with
			before = append(before, setup.CA)
			versions = append(versions, "", "-"+old)
			r.number("version before: "+commit, old)
		}
		refuseNewer(r, before)
	}
	w := faults.New(r, setup)
	w.Peers()
	w.Work(4)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	for range r.size(1, 5) {
		for _, version := range versions {
			for _, p := range []struct {
				process *stage.Process
				name    string
				works   func() error
			}{
				{w.CA, "merlon-ca", func() error { return w.TryWrite(0) }},
				{w.Agent, "merlon-agent", func() error { return w.Connected() }},
			} {
				mended := w.Rec.Break("replacement of " + p.name)
				p.process.Stop()
				p.process.Name = p.name + version
				p.process.Restart()
				mended()
				w.Until(p.name+" works after its replacement", r.bound(5*time.Second), p.works)
				time.Sleep(time.Duration(r.size(300, 2000)) * time.Millisecond)
			}
		}
	}
	if w.Snapshot().Count()["call ok"] == 0 {
		r.Error(errors.New("no call succeeded"))
	}
	r.verdict(w)
}

// refuseNewer has a version that is yet to come, whose store is of the next format, make
// a store: no CA of today or before may start on it, or change it.
func refuseNewer(r *run, binaries []string) {
	next := stage.Changed(r, "merlon-ca-next", "ca/cmd/merlon-ca",
		stage.Change{File: "ca/internal/store/badger/layout.go", Old: `const format = "2"`, New: `const format = "3"`})
	d := stage.CAAlone(r, next, nil)
	d.Merlon("token", "create")
	d.CA.Stop()
	store := filepath.Join(d.CAData(), "store")
	made := digest(r, store)
	for _, binary := range binaries {
		ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
		_, stderr, err := stage.Run(ctx, r, nil, binary, d.CA.Args...)
		cancel()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 || !strings.Contains(stderr, "a newer one wrote it") {
			r.Errorf("%s on a store of a newer version: %v; want it to say that a newer one wrote it\n%s", binary, err, stderr)
		}
		if digest(r, store) != made {
			r.Errorf("%s changed a store of a newer version", binary)
		}
	}
	r.number("versions that refused a newer store", len(binaries))
}

// digest is of all files of a folder, but the one by which Badger locks it.
func digest(r *run, dir string) string {
	r.Helper()
	sum := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "LOCK" {
			return err
		}
		text, err := os.ReadFile(path)
		fmt.Fprintf(sum, "%s %d\n", path, len(text))
		sum.Write(text)
		return err
	})
	if err != nil {
		r.Fatal(err)
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// buildAt compiles CA and agent as they were at a commit, and names it.
func buildAt(r *run, commit string) string {
	r.Helper()
	run := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			r.Fatalf("the version before is built from the history of the repository, which must be there (git fetch --unshallow): %s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	short := run("git", "rev-parse", "--short", commit)
	tree := filepath.Join(r.TempDir(), "tree-"+short)
	if err := os.Mkdir(tree, 0o700); err != nil {
		r.Fatal(err)
	}
	run("sh", "-c", "cd $(git rev-parse --show-toplevel) && git archive "+short+" | tar -x -C "+tree)
	for _, program := range []string{"ca/cmd/merlon-ca", "agent/cmd/merlon-agent"} {
		path := stage.Path(r, filepath.Base(program)+"-"+short)
		if _, err := os.Stat(path); err != nil {
			run("go", "build", "-C", tree, "-o", path, "./"+program)
		}
	}
	return short
}

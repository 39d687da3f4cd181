// The gate of known vulnerabilities. govulncheck finds nothing in a database that is
// empty, cut off or not the one that was meant, and says so as if all were well: so it
// has to find a vulnerability that was planted first.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// govulncheck is run from the module proxy, as golangci-lint is: its dependencies are
// none of Merlon's.
const govulncheck = "golang.org/x/vuln/cmd/govulncheck@v1.9.0"

// planted is what testdata/planted calls, in a version that has it.
const planted = "GO-2022-1059"

// exitFound is how govulncheck exits where it has found something.
const exitFound = 3

// vulnerable looks up every module of the repository in a database that can be
// believed.
func vulnerable(ctx context.Context, database string, w io.Writer) error {
	if err := believe(ctx, database); err != nil {
		return err
	}
	fmt.Fprintf(w, "%s: finds what was planted\n", database)
	dir, err := root()
	if err != nil {
		return err
	}
	modules, err := modulesIn(dir)
	if err != nil {
		return err
	}
	var found []error
	for _, l := range lookups(dir, modules) {
		report, code, err := check(ctx, database, l)
		name, _ := filepath.Rel(dir, l.module)
		if l.tags != "" {
			name += " with " + l.tags
		}
		switch {
		case err != nil:
			return fmt.Errorf("look up %s: %w", name, err)
		case code == exitFound:
			found = append(found, fmt.Errorf("%s:\n%s", name, report))
		default:
			fmt.Fprintf(w, "%s: nothing is known\n", name)
		}
	}
	return errors.Join(found...)
}

// tagged is what is compiled with build tags only, by folder: without them govulncheck
// does not see the files that have them. supply_test.go compares it with the sources.
var tagged = map[string]string{
	".":                     "pkcs11",
	"ca/cmd/merlon-ca-full": "awskms,cloudkms,azurekms,stepcas,vaultcas,cloudcas",
}

// A lookup is a module as it is compiled with some tags, or none.
type lookup struct{ module, tags string }

// lookups are each module without tags, and again with those that it has.
func lookups(dir string, modules []string) (all []lookup) {
	for _, module := range modules {
		all = append(all, lookup{module, ""})
		name, _ := filepath.Rel(dir, module)
		if tags := tagged[name]; tags != "" {
			all = append(all, lookup{module, tags})
		}
	}
	return all
}

// believe says why nothing follows from what a database does not know.
func believe(ctx context.Context, database string) error {
	dir, err := root()
	if err != nil {
		return err
	}
	report, code, err := check(ctx, database, lookup{module: filepath.Join(dir, "integration", "supply", "testdata", "planted")})
	if err != nil {
		return fmt.Errorf("look up what was planted: %w", err)
	}
	if code != exitFound || !strings.Contains(report, planted) {
		return fmt.Errorf("the database at %s does not know %s, so that it knows nothing else means nothing: name a whole one (https://vuln.go.dev, or a copy as file:///path)\n%s", database, planted, report)
	}
	return nil
}

// check runs govulncheck in the folder of a module. An exit that says neither found nor
// not found is an error.
func check(ctx context.Context, database string, l lookup) (report string, code int, err error) {
	cmd := exec.CommandContext(ctx, "go", "run", govulncheck, "-db", database, "-tags", l.tags, "./...")
	cmd.Dir = l.module
	out, err := cmd.CombinedOutput()
	exit, failed := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return string(out), 0, nil
	case failed && strings.Contains(string(out), fmt.Sprintf("exit status %d", exitFound)):
		return string(out), exitFound, nil // go run has an exit status of its own
	case failed:
		return "", 0, fmt.Errorf("govulncheck with the database at %s: %w\n%s", database, exit, out)
	}
	return "", 0, err
}

// modulesIn are the folders of the Go modules below dir, but what tests are made of.
func modulesIn(dir string) (modules []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "testdata" || strings.HasPrefix(e.Name(), ".") && path != dir):
			return fs.SkipDir
		case e.Name() == "go.mod":
			modules = append(modules, filepath.Dir(path))
		}
		return nil
	})
	if err == nil && len(modules) == 0 {
		err = fmt.Errorf("%s: %w", dir, os.ErrNotExist)
	}
	return modules, err
}

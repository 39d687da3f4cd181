package main

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// goList runs go list in a folder of the repository.
func goList(t *testing.T, module string, args ...string) []string {
	t.Helper()
	dir, err := root()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = filepath.Join(dir, module)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %q: %v\n%s", args, err, stderr.String())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// What may be compiled into Merlon, or into what links its SDK, has a licence in the
// table, and the module's own text agrees.
func TestLicencesAreKnown(t *testing.T) {
	table, err := readLicences()
	if err != nil {
		t.Fatal(err)
	}
	const form = "{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}"
	shipped := goList(t, "", "-deps", "-f", form, "./agent/...", "./ca/...", "./policy/...", "./sdk/...")
	shipped = append(shipped, goList(t, "", "-deps", "-tags", tagged["."], "-f", form, "./ca/cmd/...")...)
	// The full CA's own module is fetched when somebody builds it.
	if full := os.Getenv("MERLON_SUPPLY"); full != "" {
		shipped = append(shipped, goList(t, "ca/cmd/merlon-ca-full", "-deps", "-tags", tagged["ca/cmd/merlon-ca-full"], "-f", form, ".")...)
	}
	seen := map[string]bool{}
	for _, line := range shipped {
		path, dir, ok := strings.Cut(line, " ")
		if !ok || seen[path] || path == "merlon.dev" {
			continue
		}
		seen[path] = true
		id, err := licenceIn(dir)
		switch want, listed := table[path]; {
		case !listed:
			t.Errorf("%s is new, and has %s (%v): if that is one of %q, and it is wanted, add a line to licences.txt", path, id, err, allowed)
		case err != nil || id != want:
			t.Errorf("%s: %s, %v; the table says %s", path, id, err, want)
		}
	}
	if len(seen) < 50 {
		t.Errorf("%d modules are compiled in; they are not all found", len(seen))
	}
	if os.Getenv("MERLON_SUPPLY") != "" {
		for path := range table {
			if !seen[path] {
				t.Errorf("licences.txt has %s, which is compiled into nothing", path)
			}
		}
	}
}

func TestLicencesThatAreNotAllowed(t *testing.T) {
	for text, want := range map[string]string{
		"The GNU General Public License, version 3": "GPL", "GNU AFFERO\n   GENERAL PUBLIC LICENSE": "AGPL", "All rights reserved.": "", "": "",
		"Apache License\n                           Version 2.0, January 2004": "Apache-2.0",
	} {
		id := licenceOf(text)
		if id != want || (id == "Apache-2.0") != slices.Contains(allowed, id) {
			t.Errorf("%q is %q; want %q", text, id, want)
		}
	}
}

// Nothing of Merlon starts programs, uses unsafe or the network without a line that says
// why, and no line is about what is not there.
func TestImportsAreAllowed(t *testing.T) {
	why, err := readImports()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[use]bool{}
	for _, line := range goList(t, "", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, "./agent/...", "./ca/...", "./policy/...", "./sdk/...") {
		field := strings.Fields(line)
		by := strings.TrimPrefix(field[0], "merlon.dev/")
		// Only tests import these, which would not be here otherwise.
		if strings.HasSuffix(by, "/fakeca") || strings.Contains(by, "/crashtest") {
			continue
		}
		for _, imported := range field[1:] {
			u := use{imported, by}
			if !slices.Contains(guarded, imported) {
				continue
			}
			seen[u] = true
			if why[u] == "" {
				t.Errorf("%s imports %s: if it has to, say why in imports.txt", by, imported)
			}
		}
	}
	for u := range why {
		if !seen[u] {
			t.Errorf("imports.txt lets %s import %s, which it does not", u.by, u.guarded)
		}
	}
}

// `make supply` only: it links a binary.
func TestSBOMNamesEveryModule(t *testing.T) {
	if os.Getenv("MERLON_SUPPLY") == "" {
		t.Skip("make supply")
	}
	licences, err := readLicences()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "merlon-sidecar")
	if out, err := exec.Command("go", "build", "-o", binary, "merlon.dev/sdk/cmd/merlon-sidecar").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	document, err := sbom(binary, licences)
	if err != nil {
		t.Fatal(err)
	}
	var b bom
	if err := json.Unmarshal(document, &b); err != nil {
		t.Fatal(err)
	}
	want := goList(t, "", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", "./sdk/cmd/merlon-sidecar")
	slices.Sort(want)
	var got []string
	for _, c := range b.Components[1:] {
		got = append(got, c.Name+" "+c.Version)
		if len(c.Hashes) != 1 || len(c.Licences) != 1 {
			t.Errorf("%s: %v, %v; want a hash and a licence", c.Name, c.Hashes, c.Licences)
		}
	}
	slices.Sort(got)
	if want = slices.Compact(want); !slices.Equal(got, slices.DeleteFunc(want, func(s string) bool { return s == "" })) {
		t.Errorf("components %q; want %q", got, want)
	}
	delete(licences, b.Components[1].Name)
	if _, err := sbom(binary, licences); err == nil || !strings.Contains(err.Error(), b.Components[1].Name) {
		t.Errorf("a module without a licence: %v", err)
	}
}

// The gate looks at each file that is shipped with a tag only, and `make full` compiles
// what it looks at.
func TestGateSeesEveryTag(t *testing.T) {
	dir, err := root()
	if err != nil {
		t.Fatal(err)
	}
	modules, err := modulesIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	looked := lookups(dir, modules)
	tags := 0
	err = filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "testdata" || strings.HasPrefix(e.Name(), ".") && file != dir):
			return fs.SkipDir
		case e.IsDir() || filepath.Ext(file) != ".go" || strings.HasSuffix(file, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		head, _, _ := strings.Cut(string(text), "\npackage ")
		_, tag, ok := strings.Cut("\n"+head, "\n//go:build ")
		tag, _, _ = strings.Cut(tag, "\n")
		if !ok || tag == "!linux" { // what is shipped is for Linux
			return nil
		}
		tags++
		in := filepath.Dir(file)
		for !slices.Contains(modules, in) {
			in = filepath.Dir(in)
		}
		if !slices.ContainsFunc(looked, func(l lookup) bool {
			return l.module == in && slices.Contains(strings.Split(l.tags, ","), tag)
		}) {
			t.Errorf("%s is compiled with %q only, with which nothing is looked up: add it to tagged in vulns.go", file, tag)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if tags < 7 {
		t.Errorf("%d files have a tag; they are not all found", tags)
	}
	makefile, err := os.ReadFile(filepath.Join(dir, "Makefile"))
	if full := tagged["ca/cmd/merlon-ca-full"]; err != nil || !strings.Contains(string(makefile), "-tags "+full+" ") {
		t.Errorf("make full does not compile with %s (%v)", full, err)
	}
}

// `make supply` only: govulncheck is fetched and compiled.
func TestGateBelievesNoEmptyDatabase(t *testing.T) {
	if os.Getenv("MERLON_SUPPLY") == "" {
		t.Skip("make supply")
	}
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	if err := believe(t.Context(), "file://"+filepath.Join(testdata, "vulndb")); err != nil {
		t.Errorf("a database that knows what was planted: %v", err)
	}
	empty := t.TempDir()
	if err := os.Mkdir(filepath.Join(empty, "index"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"db": `{"modified":"2026-01-01T00:00:00Z"}`, "modules": `[]`, "vulns": `[]`} {
		if err := os.WriteFile(filepath.Join(empty, "index", name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := believe(t.Context(), "file://"+empty); err == nil || !strings.Contains(err.Error(), "does not know "+planted) {
		t.Errorf("an empty database: %v", err)
	}
	if err := believe(t.Context(), "file://"+filepath.Join(empty, "none")); err == nil || !strings.Contains(err.Error(), "govulncheck with the database at") {
		t.Errorf("a database that is not there: %v", err)
	}
	if err := believe(t.Context(), "http://127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "govulncheck with the database at") {
		t.Errorf("a database that does not answer: %v", err)
	}
}

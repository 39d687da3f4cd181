package bundle

// This file turns a folder that people write into an unsigned policy bundle,
// and checks an unsigned bundle that somebody sends.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"

	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
)

// TestsName is the file of a policy folder that has the tests of its grants.
const TestsName = "grants_test.yaml"

// Folder is a policy folder as read from disk.
type Folder struct {
	Grants  []grant.Grant
	Modules map[string]string // *.rego but tests, by slash-separated path
	Tests   map[string]string // *_test.rego
	// GrantTests is the content of grants_test.yaml; nil when absent.
	GrantTests []byte
}

// ReadFolder reads and checks the policy folder dir and its subfolders: every
// *.yaml is grants, but grants_test.yaml; every *.rego a module. Hidden files
// and other kinds of files are left alone. Errors name file, line and reason.
func ReadFolder(dir string) (*Folder, error) {
	f := &Folder{Modules: map[string]string{}, Tests: map[string]string{}}
	var grants []grant.File
	var total, count int
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name != dir && strings.HasPrefix(entry.Name(), ".") {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !wanted(entry) {
			return nil
		}
		// Reading follows links: mounted ConfigMaps are made of them.
		content, err := readAtMost(name, maxUncompressedBytes)
		if err != nil {
			return err
		}
		if total, count = total+len(content), count+1; total > maxUncompressedBytes || count > maxFiles {
			return fmt.Errorf("%s: more than %d files or %d bytes", dir, maxFiles, maxUncompressedBytes)
		}
		relative, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		return f.add(filepath.ToSlash(relative), content, &grants)
	})
	if err != nil {
		return nil, fmt.Errorf("read policy folder: %w", err)
	}
	if len(grants) == 0 && len(f.Modules) == 0 {
		return nil, fmt.Errorf("read policy folder: %s has neither grants (*.yaml) nor Rego (*.rego)", dir)
	}
	if f.Grants, err = grant.Parse(grants); err != nil {
		return nil, err
	}
	return f, engine.CheckModules(f.Modules)
}

// readAtMost reads a file, of a longer one limit bytes and one more: a link may lead to
// what has no end.
func readAtMost(name string, limit int64) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, limit+1))
}

func wanted(entry fs.DirEntry) bool {
	switch path.Ext(entry.Name()) {
	case ".yaml", ".yml", ".rego":
		return !entry.IsDir()
	}
	return entry.Name() == dataName && !entry.IsDir()
}

func (f *Folder) add(name string, content []byte, grants *[]grant.File) error {
	switch base := path.Base(name); {
	case base == dataName:
		return fmt.Errorf("%s: data files are not supported; write the data as rules into a .rego file", name)
	case base == TestsName:
		f.GrantTests = content
	case strings.HasSuffix(base, "_test.rego"):
		f.Tests[name] = string(content)
	case path.Ext(base) == ".rego":
		if name == engine.ModuleName {
			return fmt.Errorf("%s: this name is Merlon's own; choose another", name)
		}
		f.Modules[name] = string(content)
	case path.Ext(base) == ".yml":
		return fmt.Errorf("%s: grants are in files that end in .yaml; rename it", name)
	default:
		*grants = append(*grants, grant.File{Name: name, Data: content})
	}
	return nil
}

// Contents is what a bundle of f contains, unsigned.
func (f *Folder) Contents() *Contents {
	c := &Contents{Modules: map[string]string{engine.ModuleName: engine.Module}, Grants: f.Grants}
	maps.Copy(c.Modules, f.Modules)
	return c
}

// Build reads the policy folder dir and returns its bundle, unsigned. Equal
// folders give equal bytes.
func Build(dir string) ([]byte, error) {
	f, err := ReadFolder(dir)
	if err != nil {
		return nil, err
	}
	return unsigned(f.Contents())
}

// unsigned is the unsigned bundle of c.
func unsigned(c *Contents) ([]byte, error) {
	data, err := grant.Data(c.Grants)
	if err != nil {
		return nil, fmt.Errorf("build policy bundle: %v", err)
	}
	out := files{dataName: data}
	for name, source := range c.Modules {
		if err := checkName(name); err != nil {
			return nil, fmt.Errorf("build policy bundle: %w", err)
		}
		out[name] = []byte(source)
	}
	return pack(out)
}

// Check takes apart an unsigned bundle from a client and checks all of it:
// caps, names, grants, that the data is exactly what its grants compile to,
// and that the Rego compiles within what policies may do.
func Check(unsigned []byte) (*Contents, error) {
	f, err := unpack(unsigned)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{manifestName, signaturesName} {
		if _, present := f[name]; present {
			return nil, fmt.Errorf("check policy bundle: has %s; send it unsigned, the CA signs it", name)
		}
	}
	c, err := contents(f)
	if err != nil {
		return nil, fmt.Errorf("check policy bundle: %w", err)
	}
	if c.Modules[engine.ModuleName] != engine.Module {
		return nil, fmt.Errorf("check policy bundle: %s is not the one of this version of merlon; build the bundle again", engine.ModuleName)
	}
	if err := grant.CheckData(f[dataName], c.Grants); err != nil {
		return nil, fmt.Errorf("check policy bundle: %w", err)
	}
	return c, engine.CheckModules(c.Modules)
}

func contents(f files) (*Contents, error) {
	c := &Contents{Modules: f.modules()}
	data, present := f[dataName]
	if !present {
		return nil, errors.New("has no data.json")
	}
	var err error
	if c.Grants, err = grant.FromData(data); err != nil {
		return nil, fmt.Errorf("data.json: %w", err)
	}
	return c, nil
}

func (f files) modules() map[string]string {
	modules := map[string]string{}
	for name, content := range f {
		if path.Ext(name) == ".rego" {
			modules[name] = string(content)
		}
	}
	return modules
}

// decodeJSON reads the one JSON value in data; numbers keep their text.
func decodeJSON(data []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if dec.More() || len(bytes.TrimSpace(data[dec.InputOffset():])) > 0 {
		return errors.New("more than one JSON value")
	}
	return nil
}

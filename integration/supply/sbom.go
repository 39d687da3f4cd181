// The bill of materials of a binary, from what the linker wrote into it: CycloneDX 1.6,
// the part of it that a Go binary can answer for.

package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
)

type bom struct {
	Format     string      `json:"bomFormat"`
	Version    string      `json:"specVersion"`
	Metadata   metadata    `json:"metadata"`
	Components []component `json:"components"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Type       string     `json:"type"`
	Name       string     `json:"name"`
	Version    string     `json:"version,omitempty"`
	PURL       string     `json:"purl,omitempty"`
	Hashes     []hash     `json:"hashes,omitempty"`
	Licences   []licence  `json:"licenses,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type hash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

type licence struct {
	ID struct {
		ID string `json:"id"`
	} `json:"license"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// sbom describes the binary at path. A module without a licence is an error.
func sbom(path string, licences map[string]string) ([]byte, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read what %s is made of: %w", path, err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(content)
	of := component{Type: "application", Name: filepath.Base(path), Version: info.Main.Version, Hashes: []hash{{"SHA-256", hex.EncodeToString(sum[:])}}}
	for _, s := range info.Settings {
		of.Properties = append(of.Properties, property{"go:" + s.Key, s.Value})
	}
	b := bom{Format: "CycloneDX", Version: "1.6", Metadata: metadata{of}}
	b.Components = append(b.Components, component{Type: "library", Name: "std", Version: info.GoVersion, PURL: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")})
	for _, m := range info.Deps {
		if m.Path == "merlon.dev" {
			continue // the full CA is a module of its own, of this repository
		}
		c, err := componentOf(m, licences)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		b.Components = append(b.Components, c)
	}
	return json.MarshalIndent(b, "", "  ")
}

func componentOf(m *debug.Module, licences map[string]string) (component, error) {
	if m.Replace != nil {
		return component{}, fmt.Errorf("module %s is replaced by %s, which nobody else has", m.Path, m.Replace.Path)
	}
	id, ok := licences[m.Path]
	if !ok {
		return component{}, fmt.Errorf("module %s is not in licences.txt", m.Path)
	}
	// go.sum's hash of the module's files, in the form of CycloneDX.
	sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:"))
	if err != nil || len(sum) != sha256.Size {
		return component{}, fmt.Errorf("module %s has the sum %q, which is none of go.sum", m.Path, m.Sum)
	}
	c := component{Type: "library", Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + m.Path + "@" + m.Version, Hashes: []hash{{"SHA-256", hex.EncodeToString(sum)}}}
	var l licence
	l.ID.ID = id
	c.Licences = []licence{l}
	return c, nil
}

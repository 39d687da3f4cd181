// Licences of what is compiled into Merlon: a table that somebody has looked at
// (licences.txt), and what the text in a module's folder says.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// allowed are licences under which Merlon may be given away as it is, by their SPDX
// identifiers.
var allowed = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0"}

// readLicences reads licences.txt: a licence and a module on each line.
func readLicences() (map[string]string, error) {
	dir, err := root()
	if err != nil {
		return nil, err
	}
	file, err := os.Open(filepath.Join(dir, "integration", "supply", "licences.txt"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	of := map[string]string{}
	lines := bufio.NewScanner(file)
	for n := 1; lines.Scan(); n++ {
		field := strings.Fields(lines.Text())
		switch {
		case len(field) != 2:
			return nil, fmt.Errorf("licences.txt:%d: want a licence and a module", n)
		case !slices.Contains(allowed, field[0]):
			return nil, fmt.Errorf("licences.txt:%d: %s is none of %q", n, field[0], allowed)
		case of[field[1]] != "":
			return nil, fmt.Errorf("licences.txt:%d: %s is there twice", n, field[1])
		}
		of[field[1]] = field[0]
	}
	return of, lines.Err()
}

// words of the texts, each in one licence of those that we know; the first that fits
// counts.
var words = []struct{ id, text string }{
	{"MPL-2.0", "mozilla public license version 2.0"},
	{"MPL-2.0", "mozilla public license, version 2.0"},
	{"Apache-2.0", "apache license version 2.0"},
	{"Apache-2.0", "licensed under the apache license, version 2.0"},
	{"GPL", "gnu general public license"},
	{"LGPL", "gnu lesser general public license"},
	{"AGPL", "gnu affero general public license"},
	{"MIT", "permission is hereby granted, free of charge, to any person obtaining a copy"},
	{"ISC", "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee"},
	{"ISC", "permission to use, copy, modify, and distribute this software for any purpose with or without fee"},
	{"BSD-3-Clause", "may be used to endorse or promote products derived from this software"},
	{"BSD-2-Clause", "redistributions in binary form must reproduce the above copyright notice"},
}

var (
	licenceFile = regexp.MustCompile(`(?i)^(licen[sc]e|copying|unlicense)`)
	spaces      = regexp.MustCompile(`[\s>]+`) // some quote the text
)

// licenceIn reads the licence in a module's folder.
func licenceIn(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if !licenceFile.MatchString(e.Name()) || e.IsDir() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", err
		}
		if id := licenceOf(string(text)); id != "" {
			return id, nil
		}
	}
	return "", errors.New("there is no licence that we know")
}

func licenceOf(text string) string {
	text = spaces.ReplaceAllString(strings.ToLower(text), " ")
	for _, w := range words {
		if strings.Contains(text, w.text) {
			return w.id
		}
	}
	return ""
}

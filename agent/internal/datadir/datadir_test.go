// Files that come back as they were, or not at all.

package datadir

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

func open(t *testing.T, path string, source seal.Source) (*Dir, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer
	d, err := Open(path, "a.test", source, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return d, &log
}

func newFolder(t *testing.T) string { return filepath.Join(t.TempDir(), "data") }

func keyFile(t *testing.T, digit string) seal.Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kek")
	if err := os.WriteFile(path, []byte(strings.Repeat(digit, 64)), 0o600); err != nil {
		t.Fatal(err)
	}
	return seal.Source{File: path}
}

func wants(t *testing.T, d *Dir, name, content string) {
	t.Helper()
	if got, err := d.Read(t.Context(), name); err != nil || string(got) != content {
		t.Errorf("Read(%s) = %q, %v; want %q", name, got, err, content)
	}
}

func files(t *testing.T, folder string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestWhatIsWrittenComesBack(t *testing.T) {
	folder := newFolder(t)
	d, _ := open(t, folder, seal.Source{})
	wants(t, d, "seen", "")
	for _, content := range []string{"first secret", "second secret"} {
		if err := d.Write("seen", []byte(content)); err != nil {
			t.Fatal(err)
		}
		d, _ = open(t, folder, seal.Source{})
		wants(t, d, "seen", content)
	}
	if got := files(t, folder); strings.Join(got, " ") != "kek seen.sealed" {
		t.Errorf("the folder holds %q", got)
	}
	path := filepath.Join(folder, "seen.sealed")
	onDisk, err := os.ReadFile(path)
	if err != nil || bytes.Contains(onDisk, []byte("secret")) {
		t.Errorf("on the disk: %q, %v", onDisk, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Read(t.Context(), "seen"); err == nil {
		t.Errorf("a file that the group can read was read: %q", got)
	}
}

func TestFolderOpenToOthersIsRefused(t *testing.T) {
	folder := newFolder(t)
	open(t, folder, seal.Source{})
	if err := os.Chmod(folder, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(folder, "a.test", seal.Source{}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a data directory that the group can read was accepted")
	}
}

// Damage, another file in its place, another trust domain's: set aside, kept,
// and said.
func TestFolderIsOneAgents(t *testing.T) {
	folder := newFolder(t)
	first, _ := open(t, folder, seal.Source{})
	second, _ := open(t, folder, seal.Source{})
	lock, err := first.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Lock(); err == nil || !strings.Contains(err.Error(), "another agent runs in it") {
		t.Errorf("Lock() = %v while another has it; want that said", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := second.Lock()
	if err != nil {
		t.Fatalf("Lock() = %v after the other ended", err)
	}
	again.Close()
}

func TestFolderOfAnotherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a folder away")
	}
	folder := newFolder(t)
	open(t, folder, seal.Source{})
	if err := os.Chown(folder, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(folder, "a.test", seal.Source{}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "belongs to uid 12345") {
		t.Errorf("Open of another user's folder = %v; want it refused", err)
	}
}

func TestDamagedFilesAreSetAside(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, path string){
		"flipped bit": func(t *testing.T, path string) {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content[len(content)/2] ^= 1
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut off": func(t *testing.T, path string) {
			if err := os.Truncate(path, 20); err != nil {
				t.Fatal(err)
			}
		},
		"empty": func(t *testing.T, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		},
		"another file": func(t *testing.T, path string) {
			if err := os.Rename(filepath.Join(filepath.Dir(path), "other.sealed"), path); err != nil {
				t.Fatal(err)
			}
		},
		"another trust domain": func(t *testing.T, path string) {
			d, err := Open(filepath.Dir(path), "b.test", seal.Source{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Write("cache", []byte("foreign")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			folder := newFolder(t)
			d, log := open(t, folder, seal.Source{})
			for _, file := range []string{"cache", "other"} {
				if err := d.Write(file, []byte("content of "+file)); err != nil {
					t.Fatal(err)
				}
			}
			spoil(t, filepath.Join(folder, "cache.sealed"))
			if got, err := d.Read(t.Context(), "cache"); err != nil || got != nil {
				t.Errorf("Read = %q, %v; want nothing", got, err)
			}
			if aside, _ := filepath.Glob(filepath.Join(folder, "cache.sealed.set-aside-*")); len(aside) != 1 || !strings.Contains(log.String(), aside[0]) {
				t.Errorf("set aside: %q; log: %s", aside, log)
			}
			// The next one is good again.
			if err := d.Write("cache", []byte("new")); err != nil {
				t.Fatal(err)
			}
			wants(t, d, "cache", "new")
		})
	}
}

func TestOnlyTheLastFewAreKeptAside(t *testing.T) {
	folder := newFolder(t)
	d, _ := open(t, folder, seal.Source{})
	for range 2 * maxAside {
		if err := d.Write("cache", []byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := d.SetAside(t.Context(), "cache", errors.New("for a test")); err != nil {
			t.Fatal(err)
		}
	}
	if aside, _ := filepath.Glob(filepath.Join(folder, "*set-aside*")); len(aside) != maxAside {
		t.Errorf("%d are kept; want %d", len(aside), maxAside)
	}
}

// A wrong setting must not cost what lies there.
func TestAnotherKeyIsAnError(t *testing.T) {
	folder := newFolder(t)
	d, _ := open(t, folder, keyFile(t, "0"))
	if err := d.Write("seen", []byte("x")); err != nil {
		t.Fatal(err)
	}
	d, _ = open(t, folder, keyFile(t, "1"))
	if _, err := d.Read(t.Context(), "seen"); !errors.Is(err, seal.ErrWrongKey) {
		t.Errorf("Read = %v; want ErrWrongKey", err)
	}
	if got := files(t, folder); strings.Join(got, " ") != "seen.sealed" {
		t.Errorf("the folder holds %q", got)
	}
	if _, err := Open(folder, "a.test", seal.Source{File: "/nowhere"}, slog.New(slog.DiscardHandler)); !errors.Is(err, seal.ErrNoKey) {
		t.Errorf("Open = %v; want ErrNoKey", err)
	}
}

// An older agent's files are taken over once; under a configured key never.
func TestFilesInClear(t *testing.T) {
	for name, tt := range map[string]struct {
		source seal.Source
		want   string
	}{"default key": {seal.Source{}, "from before"}, "configured key": {keyFile(t, "0"), ""}} {
		t.Run(name, func(t *testing.T) {
			folder := newFolder(t)
			d, _ := open(t, folder, tt.source)
			path := filepath.Join(folder, "seen.json")
			if err := os.WriteFile(path, []byte("from before"), 0o600); err != nil {
				t.Fatal(err)
			}
			wants(t, d, "seen", tt.want)
			wants(t, d, "seen", tt.want)
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) != (tt.want != "") {
				t.Errorf("the clear file: %v", err)
			}
		})
	}
}

// A crash between write and rename leaves a copy.
func TestUnfinishedFilesAreRemoved(t *testing.T) {
	folder := newFolder(t)
	d, _ := open(t, folder, seal.Source{})
	if err := d.Write("seen", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, durable.Unfinished+"seen-1"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, _ = open(t, folder, seal.Source{})
	wants(t, d, "seen", "kept")
	if got := files(t, folder); strings.Join(got, " ") != "kek seen.sealed" {
		t.Errorf("the folder holds %q", got)
	}
}

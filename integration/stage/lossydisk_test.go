package stage_test

// The disk that loses power keeps what was synced, and nothing else: by real system
// calls, mappings among them.

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/durable"
)

// lossy mounts a disk with a file "kept" that is durable.
func lossy(t *testing.T) *stage.LossyDisk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root mounts file systems")
	}
	disk := stage.NewLossyDisk(t)
	put(t, filepath.Join(disk.Path, "kept"), "before")
	disk.Sync()
	return disk
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// change writes text to the begin of a file, and syncs it if it is to be.
func change(t *testing.T, path, text string, flags int, sync bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if sync {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
}

// mapped writes text to a mapping of a file.
func mapped(t *testing.T, path, text string, sync bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, len(text), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(m, text)
	if sync {
		if err := unix.Msync(m, unix.MS_SYNC); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
}

func do(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestLossyDiskKeepsWhatWasSynced(t *testing.T) {
	disk := lossy(t)
	for name, c := range map[string]struct {
		do   func(t *testing.T, dir string)
		want string // what is there then, as NAME=TEXT; besides kept=before nothing
	}{
		"written":                  {func(t *testing.T, dir string) { change(t, dir+"/kept", "AFTER!", 0, false) }, "kept=before"},
		"written, synced":          {func(t *testing.T, dir string) { change(t, dir+"/kept", "AFTER!", 0, true) }, "kept=AFTER!"},
		"written with O_SYNC":      {func(t *testing.T, dir string) { change(t, dir+"/kept", "AFTER!", os.O_SYNC, false) }, "kept=AFTER!"},
		"longer":                   {func(t *testing.T, dir string) { change(t, dir+"/kept", "before and after", 0, false) }, "kept=before"},
		"longer, synced":           {func(t *testing.T, dir string) { change(t, dir+"/kept", "before and after", 0, true) }, "kept=before and after"},
		"cut":                      {func(t *testing.T, dir string) { do(t, os.Truncate(dir+"/kept", 2)) }, "kept=before"},
		"mapped":                   {func(t *testing.T, dir string) { mapped(t, dir+"/kept", "AFTER!", false) }, "kept=before"},
		"mapped, synced":           {func(t *testing.T, dir string) { mapped(t, dir+"/kept", "AFTER!", true) }, "kept=AFTER!"},
		"new, synced":              {func(t *testing.T, dir string) { change(t, dir+"/new", "x", 0, true) }, "kept=before"},
		"new, its name synced":     {func(t *testing.T, dir string) { change(t, dir+"/new", "x", 0, false); do(t, durable.SyncDir(dir)) }, "kept=before new="},
		"new, both synced":         {func(t *testing.T, dir string) { change(t, dir+"/new", "x", 0, true); do(t, durable.SyncDir(dir)) }, "kept=before new=x"},
		"renamed":                  {func(t *testing.T, dir string) { do(t, os.Rename(dir+"/kept", dir+"/new")) }, "kept=before"},
		"renamed, synced":          {func(t *testing.T, dir string) { do(t, os.Rename(dir+"/kept", dir+"/new"), durable.SyncDir(dir)) }, "new=before"},
		"removed":                  {func(t *testing.T, dir string) { do(t, os.Remove(dir+"/kept")) }, "kept=before"},
		"removed, synced":          {func(t *testing.T, dir string) { do(t, os.Remove(dir+"/kept"), durable.SyncDir(dir)) }, ""},
		"linked, synced":           {func(t *testing.T, dir string) { do(t, os.Link(dir+"/kept", dir+"/new"), durable.SyncDir(dir)) }, "kept=before new=before"},
		"replaced as durable does": {func(t *testing.T, dir string) { do(t, durable.WriteFile(dir, "kept", []byte("next"))) }, "kept=next"},
		"in a folder that is not": {func(t *testing.T, dir string) {
			do(t, os.Mkdir(dir+"/sub", 0o700))
			change(t, dir+"/sub/x", "x", 0, true)
			do(t, durable.SyncDir(dir+"/sub"))
		}, "kept=before"},
		"moved, the old name synced": {func(t *testing.T, dir string) {
			do(t, os.Rename(dir+"/kept", dir+"/elsewhere/kept"), durable.SyncDir(dir))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(disk.Path, strings.ReplaceAll(name, " ", "-"))
			do(t, os.Mkdir(dir, 0o700))
			put(t, dir+"/kept", "before")
			if strings.Contains(name, "moved") {
				do(t, os.Mkdir(dir+"/elsewhere", 0o700))
			}
			disk.Sync()
			c.do(t, dir)
			disk.Cut()
			if _, err := os.ReadFile(dir + "/kept"); err == nil {
				t.Error("a file was read without power")
			}
			disk.Mount()
			if got := all(t, dir); got != c.want {
				t.Errorf("there is %q; want %q", got, c.want)
			}
		})
	}
}

// all is what a folder holds, but for folders, as NAME=TEXT.
func all(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	do(t, err)
	var found []string
	for _, e := range entries {
		if e.IsDir() && e.Name() == "elsewhere" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		do(t, err)
		found = append(found, e.Name()+"="+string(text))
	}
	return strings.Join(found, " ")
}

// Some of what was not synced is kept, page by page, and it is not always the same.
func TestLossyDiskKeepsSomePages(t *testing.T) {
	const pages, size = 64, 4096
	disk := lossy(t)
	path := filepath.Join(disk.Path, "big")
	change(t, path, strings.Repeat("a", pages*size), 0, true)
	do(t, durable.SyncDir(disk.Path))
	change(t, path, strings.Repeat("b", pages*size), 0, false)
	disk.CutSome(1)
	disk.Mount()
	text, err := os.ReadFile(path)
	do(t, err)
	kept := 0
	for page := range slices.Chunk(text, size) {
		switch {
		case bytes.Equal(page, bytes.Repeat([]byte("b"), size)):
			kept++
		case !bytes.Equal(page, bytes.Repeat([]byte("a"), size)):
			t.Fatalf("a page is neither of before nor of after: %.20q", page)
		}
	}
	if len(text) != pages*size || kept == 0 || kept == pages {
		t.Errorf("%d bytes, %d pages are kept; want some of %d", len(text), kept, pages)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	if err := syscall.Access(filepath.Join(disk.Path, "kept"), syscall.F_OK); err != nil {
		t.Error(err)
	}
}

// Package datadir is the agent's folder on disk. Every file in it is sealed
// (sdk/seal): as of its name and its trust domain, so that none passes for
// another, and under a key that the operator configured, or that lies beside
// them. What cannot be opened is set aside with a word in the log, never
// believed and never removed: the agent goes on without it.
package datadir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

const (
	suffix = ".sealed"
	aside  = ".set-aside-"
	// maxAside bounds what is kept of one file.
	maxAside = 3
	// maxBytes bounds what is read back: the SVIDs of 100 000 workloads.
	maxBytes = 256 << 20
)

// clearNames are the files of agents that did not seal yet.
var clearNames = map[string]string{
	"agent_svid": "agent_svid.pem", "trust_bundle": "trust_bundle.json", "seen": "seen.json", "logs": "logs.json",
	"policy_state": "policy_state.json", "policy_bundle": "policy_bundle.tar.gz",
}

// Dir is safe for concurrent use; of several writers of one name the last wins.
type Dir struct {
	path, trustDomain string
	key               *seal.Key
	log               *slog.Logger
}

// Open makes the folder for this user alone, or refuses one that others can
// enter, and reads the key that source names. Where source names none, the key
// lies in the folder, and is made at the first start: that protects copies of
// single files, and nothing from who can read the folder.
func Open(path, trustDomain string, source seal.Source, log *slog.Logger) (*Dir, error) {
	if err := durable.MakeDir(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open the data directory: %w", err)
	}
	if !fi.IsDir() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("data directory %s has mode %04o, which lets other users in; chmod it to 0700", path, fi.Mode().Perm())
	}
	if uid := owner(fi); uid != os.Geteuid() && uid != 0 {
		return nil, fmt.Errorf("data directory %s belongs to uid %d, who can put older files in the place of newer ones; run: chown %d %s", path, uid, os.Geteuid(), path)
	}
	if err := durable.RemoveUnfinished(path); err != nil {
		return nil, fmt.Errorf("clean the data directory: %w", err)
	}
	d := &Dir{path: path, trustDomain: trustDomain, log: log}
	if d.key, err = openKey(source, path); err != nil {
		return nil, fmt.Errorf("open the data directory: %w", err)
	}
	return d, nil
}

// owner is the user to whom a folder belongs.
func owner(fi fs.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

func openKey(source seal.Source, path string) (*seal.Key, error) {
	key, err := seal.Read(source, path)
	if !errors.Is(err, seal.ErrNoKey) || source != (seal.Source{}) {
		return key, err
	}
	// If files are sealed already they are lost, and set aside one by one.
	if err := seal.Make(path); err != nil {
		return nil, fmt.Errorf("make a key to seal with: %w", err)
	}
	return seal.Read(source, path)
}

// Lock keeps the folder for this process until the result is closed, or the
// process ends. Two agents in one folder would show one SVID, and the CA evicts
// both.
func (d *Dir) Lock() (io.Closer, error) {
	f, err := os.Open(d.path)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errors.New("another agent runs in it: stop that one, or give this one a data_dir and a join token of its own")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock the data directory %s: %w", d.path, err), f.Close())
	}
	return f, nil
}

// Path is the folder's.
func (d *Dir) Path() string { return d.path }

// Key is what the files are sealed under.
func (d *Dir) Key() *seal.Key { return d.key }

func (d *Dir) file(name string) string { return filepath.Join(d.path, name+suffix) }

func (d *Dir) as(name string) []string { return []string{"merlon agent file", d.trustDomain, name} }

// Write replaces the file called name in one step.
func (d *Dir) Write(name string, content []byte) error {
	sealed, err := d.key.Seal(content, d.as(name)...)
	if err != nil {
		return fmt.Errorf("seal %s: %w", name, err)
	}
	return durable.WriteFile(d.path, name+suffix, sealed)
}

// Read returns what Write wrote, nil when there is no such file, or when it
// was damaged and is set aside now. A file under another key is an error,
// because the settings may name the wrong one: seal.ErrWrongKey.
func (d *Dir) Read(ctx context.Context, name string) ([]byte, error) {
	sealed, err := durable.ReadGuarded(d.file(name), 0o600, maxBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return d.readClear(ctx, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read what the agent keeps: %w", err)
	}
	content, err := d.key.Open(sealed, d.as(name)...)
	switch {
	case errors.Is(err, seal.ErrBroken):
		return nil, d.SetAside(ctx, name, err)
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", d.file(name), err)
	}
	return content, nil
}

// readClear takes over what an agent wrote that did not seal yet. Under a
// configured key nothing in clear is believed: who can write the disk, and has
// not the key, could have put it there.
func (d *Dir) readClear(ctx context.Context, name string) ([]byte, error) {
	old := clearNames[name]
	if old == "" || d.key.Configured() {
		return nil, nil
	}
	path := filepath.Join(d.path, old)
	content, err := durable.ReadGuarded(path, 0o600, maxBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what the agent keeps: %w", err)
	}
	if err := d.Write(name, content); err != nil {
		return nil, err
	}
	d.log.LogAttrs(ctx, slog.LevelInfo, "file that lay in clear is sealed now", slog.String("was", path))
	return content, os.Remove(path)
}

// SetAside keeps the file called name as evidence, under another name, and
// says so: why is what is wrong with it. The last few are kept.
func (d *Dir) SetAside(ctx context.Context, name string, why error) error {
	from := d.file(name)
	to := from + aside + time.Now().UTC().Format("20060102T150405.000000000")
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("set a damaged file aside: %w", err)
	}
	d.log.LogAttrs(ctx, slog.LevelError, "file is not used, and is set aside; the agent goes on without what it held",
		slog.String("file", from), slog.String("set_aside", to), slog.Any("err", why))
	kept, err := filepath.Glob(from + aside + "*")
	if err != nil {
		return err
	}
	slices.Sort(kept)
	for _, old := range kept[:max(len(kept)-maxAside, 0)] {
		if err := os.Remove(old); err != nil {
			return fmt.Errorf("remove what was set aside before: %w", err)
		}
	}
	return nil
}

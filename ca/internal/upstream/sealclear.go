// The first look at a folder of keys: which key-encryption key is used, and what
// an older merlon-ca left in clear, which is read once and sealed. The clear file
// is removed only after the sealed one is synced, so a crash leaves both at worst.

package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

const (
	clearFile = "key.pem"
	clearType = "PRIVATE KEY"
)

// openKEK reads the key-encryption key once it is needed. The one that is used
// where none is configured is made, unless something is sealed already.
func (d *keyDir) openKEK() error {
	if d.kek != nil {
		return nil
	}
	k, err := seal.Read(d.source, filepath.Dir(d.path))
	if errors.Is(err, seal.ErrNoKey) && d.source == (seal.Source{}) {
		sealed, err2 := d.anySealed()
		switch {
		case err2 != nil:
			return err2
		case sealed:
			return fmt.Errorf("%w, and keys are sealed under it", err)
		}
		if err := seal.Make(filepath.Dir(d.path)); err != nil {
			return fmt.Errorf("make a key-encryption key: %w", err)
		}
		if k, err = seal.Read(d.source, filepath.Dir(d.path)); err == nil {
			d.log.LogAttrs(context.Background(), slog.LevelInfo, "key-encryption key made; it protects copies of the keys folder that are without it, and nothing from who can read this disk",
				slog.String("file", k.Place()), slog.String("keys", d.path))
		}
	}
	d.kek = k
	return err
}

func (d *keyDir) anySealed() (bool, error) {
	sealed, err := filepath.Glob(filepath.Join(d.path, "*", sealedFile))
	return len(sealed) > 0, err
}

// sealClear seals every key that lies in clear.
func (d *keyDir) sealClear(ctx context.Context) error {
	for what, numbers := range d.numbers {
		for _, number := range numbers {
			path := filepath.Join(d.folder(what, number), clearFile)
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := d.sealOne(path, what, number); err != nil {
				return fmt.Errorf("seal %s: %w", path, err)
			}
			d.log.LogAttrs(ctx, slog.LevelInfo, "key that lay in clear is sealed now; its bytes may stay on the disk until they are overwritten, and in older copies",
				slog.String("was", path), slog.String("key_encryption_key", d.kek.Place()))
		}
	}
	return nil
}

func (d *keyDir) sealOne(path string, what kind, number int) error {
	folder := filepath.Dir(path)
	if err := durable.CheckMode(folder, fs.ModeDir, 0o700); err != nil {
		return err
	}
	text, err := readPrivate(path)
	if err != nil {
		return err
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != clearType || len(rest) > 0 {
		return fmt.Errorf("it is not one %s in PEM", clearType)
	}
	if _, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
		return err // nothing that could not be used is put in the place of what was there
	}
	if err := d.openKEK(); err != nil {
		return err
	}
	if err := d.putSealed(block.Bytes, what, number); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return durable.SyncDir(folder)
}

// putSealed writes the sealed file of a generation that exists. One that is there
// after a crash must hold the same key.
func (d *keyDir) putSealed(private []byte, what kind, number int) error {
	folder, at := d.folder(what, number), d.seat(what, number)
	text, err := readPrivate(filepath.Join(folder, sealedFile))
	if err == nil {
		there, err := openKey(d.kek, text, at)
		if err == nil && !bytes.Equal(there, private) {
			err = fmt.Errorf("beside it %s holds another key; move away the one that does not belong to %s", sealedFile, certFile)
		}
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	sealed, err := sealKey(d.kek, private, at)
	if err != nil {
		return err
	}
	return durable.WriteFile(folder, sealedFile, sealed)
}

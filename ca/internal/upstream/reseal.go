// Another key-encryption key for all keys of a folder that no CA uses. One file
// after the other is replaced in one step: a kill in between leaves each under the
// old key or the new one, and the next run goes on.

package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

// ErrKeysInUse is returned while a CA has the folder open.
var ErrKeysInUse = errors.New("a CA uses these keys")

// Lock takes the folder of keys for its holder alone, until it is closed or its
// process ends. A folder that does not exist is made.
func Lock(dir string) (io.Closer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", dir, ErrKeysInUse)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// Resealed says what Reseal did.
type Resealed struct {
	// Sealed were sealed anew; Already were under the new key.
	Sealed, Already int
}

// Reseal seals the keys of cfg under the key of to instead of that of cfg.KEK,
// which can be removed afterwards. The caller holds the Lock.
func Reseal(ctx context.Context, cfg Config, to seal.Source) (Resealed, error) {
	done, err := reseal(ctx, cfg, to)
	if err != nil {
		return done, fmt.Errorf("reseal the keys in %s: %w", cfg.Dir, err)
	}
	return done, nil
}

func reseal(ctx context.Context, cfg Config, to seal.Source) (done Resealed, err error) {
	if cfg.KEK == to {
		return done, errors.New("the old key-encryption key and the new one are the same")
	}
	if _, err := os.Stat(cfg.Dir); err != nil {
		return done, err // and do not make it
	}
	old, err := openKeyDir(ctx, cfg, nil)
	if err != nil {
		return done, err
	}
	fresh := *old
	fresh.source, fresh.kek = to, nil
	if err := fresh.openTarget(); err != nil {
		return done, err
	}
	for what, numbers := range old.numbers {
		for _, number := range numbers {
			if err := ctx.Err(); err != nil {
				return done, err
			}
			if err := resealOne(old, &fresh, what, number, &done); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

// openTarget reads the new key-encryption key. Where it is the one that nobody
// configures, it is made although keys are sealed: under another.
func (d *keyDir) openTarget() error {
	var err error
	if d.kek, err = seal.Read(d.source, filepath.Dir(d.path)); errors.Is(err, seal.ErrNoKey) && d.source == (seal.Source{}) {
		if err := seal.Make(filepath.Dir(d.path)); err != nil {
			return fmt.Errorf("make a key-encryption key: %w", err)
		}
		d.kek, err = seal.Read(d.source, filepath.Dir(d.path))
	}
	return err
}

func resealOne(old, fresh *keyDir, what kind, number int, done *Resealed) error {
	path, at := filepath.Join(old.folder(what, number), sealedFile), old.seat(what, number)
	text, err := readPrivate(path)
	if errors.Is(err, fs.ErrNotExist) { // an anchor, or a key elsewhere
		return nil
	}
	if err != nil {
		return err
	}
	if _, err = openKey(fresh.kek, text, at); err == nil {
		done.Already++
		return nil
	}
	if !errors.Is(err, seal.ErrWrongKey) {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := old.openKEK(); err != nil {
		return err
	}
	private, err := openKey(old.kek, text, at)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	sealed, err := sealKey(fresh.kek, private, at)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Dir(path), sealedFile, sealed); err != nil {
		return err
	}
	done.Sealed++
	return nil
}

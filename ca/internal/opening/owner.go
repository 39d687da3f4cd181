// Whose files they are: nothing is written as root into what belongs to the CA's own
// user, who could not read it any more.

package opening

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"merlon.dev/ca/internal/config"
)

// CheckOwners refuses to serve, as root, from what belongs to the CA's own user,
// who could not read what root writes there any more.
func CheckOwners(c config.Config) error {
	for _, path := range []string{c.DataDir, c.StoreDir()} {
		err := CheckOwner(path)
		if owner, ok := errors.AsType[*StoreError](err); ok {
			owner.Hint = "run merlon-ca as that user, or give it all of data_dir: chown -R"
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// CheckOwner refuses to write as root into what belongs to the CA's own user,
// who could not read it any more.
func CheckOwner(path string) error {
	for ; ; path = filepath.Dir(path) {
		fi, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) && path != filepath.Dir(path) {
			if os.Geteuid() != 0 {
				return nil // what it makes belongs to it
			}
			continue
		}
		if err != nil {
			return err
		}
		owner := fi.Sys().(*syscall.Stat_t).Uid // always so on Unix
		if int(owner) == os.Geteuid() {
			return nil
		}
		return &StoreError{fmt.Errorf("%s belongs to uid %d, and this is uid %d", path, owner, os.Geteuid()), "run it as the CA's user: sudo -u … merlon store …"}
	}
}

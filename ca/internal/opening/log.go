// Whether the audit log may be a new one: the file is made before the key that signs
// its checkpoints, so a key without a file has signed for records that are gone.

package opening

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
)

// LogKeyFolder is in keys, and there for as long as there is the log.
const LogKeyFolder = "log-1"

// LostLogError is returned by a CA whose audit log is not there, and that has had
// one.
type LostLogError struct {
	// Path is where the log is looked for, Proof what shows that there was one.
	Path, Proof string
}

// Error implements error.
func (e *LostLogError) Error() string {
	return fmt.Sprintf("there is no record in the audit log, %s, and this CA has had one, as %s shows", e.Path, e.Proof)
}

// BeginOfLog is the first record of the log, 0 where it is to begin with the next
// one: another log under a key that has signed for a lost one would contradict it.
// A first start that was killed after it made the key has left a file with nothing
// in it, and no later keys.
func BeginOfLog(c config.Config) (uint64, error) {
	first, err := audit.Begin(c.AuditPath())
	missing := errors.Is(err, os.ErrNotExist)
	if err != nil && !missing {
		return 0, fmt.Errorf("open audit log: %w", err)
	}
	key := filepath.Join(c.KeysDir(), LogKeyFolder)
	if first > 0 || !fileExists(key) {
		return first, nil
	}
	if missing {
		return 0, &LostLogError{c.AuditPath(), key}
	}
	if later := laterKeys(c); later != "" {
		return 0, &LostLogError{c.AuditPath(), later}
	}
	return 0, nil
}

// What to do next about a store that cannot be opened: one answer for merlon-ca
// and merlon store.

package opening

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"merlon.dev/ca/internal/store"
)

// StoreError is a reason why a store cannot be backed up, restored or moved,
// with what to do about it.
type StoreError struct {
	Err  error
	Hint string
}

// Error implements error.
func (e *StoreError) Error() string { return e.Err.Error() }

// Unwrap returns the reason.
func (e *StoreError) Unwrap() error { return e.Err }

// WithHint is err with what to do about it.
func WithHint(err error, hint string) error { return &StoreError{err, hint} }

// Hinted adds what to do about err, where that is known and not said yet.
func Hinted(err error) error {
	if _, done := errors.AsType[*StoreError](err); err == nil || done {
		return err
	}
	if hint := Hint(err); hint != "" {
		return &StoreError{err, hint}
	}
	return err
}

// Hint says what to do about an error of the store; empty if that is not
// known.
func Hint(err error) string {
	if e, ok := errors.AsType[*StoreError](err); ok {
		return e.Hint
	}
	if older, ok := errors.AsType[*store.OlderError](err); ok {
		return fmt.Sprintf("put the later store back, or restore the newest backup (merlon store restore -h); to give up what is lost, start once with -accept-older-store=%d, with etcd while every other replica is stopped", older.Revision)
	}
	if lost, ok := errors.AsType[*LostStoreError](err); ok {
		return "one of three: set data_dir, or etcd_endpoints and etcd_prefix, to where the store is (is its disk mounted?); or restore a backup: merlon store restore -h; or, if " + lost.Place + " is lost for good, begin a new one: start once with -new-store"
	}
	if lost, ok := errors.AsType[*LostLogError](err); ok {
		return "one of two: put the newest copy of audit*.jsonl and audit.tree back into " + filepath.Dir(lost.Path) + " (is its disk mounted?); or, if they are lost for good, move what is left of them and keys/" + LogKeyFolder + " away: the CA begins another log under another key, and every agent says so once"
	}
	switch {
	case errors.Is(err, store.ErrUnfinished):
		return "run that command again: it clears away what it left, and goes on"
	case errors.Is(err, store.ErrInUse):
		return "another merlon-ca runs on this data directory"
	case errors.Is(err, store.ErrReadOnly) && strings.Contains(err.Error(), "disk_reserve_mib"):
		return "free some space on that disk, or set disk_reserve_mib lower"
	case errors.Is(err, store.ErrUnavailable) && strings.Contains(err.Error(), "tls: "):
		return "etcd and this CA do not know each other's certificates: look at etcd_ca_file, etcd_cert_file and etcd_key_file, and at etcd's --trusted-ca-file"
	case errors.Is(err, store.ErrUnavailable):
		return "look at etcd and at etcd_endpoints: etcdctl endpoint health"
	}
	return ""
}

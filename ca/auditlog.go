// What the configuration says about the audit log, and whether it may be a new
// one: the file is made before the key that signs its checkpoints, so a key without
// a file has signed for records that are gone.

package ca

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
)

const (
	issuanceStrict = "strict"
	issuanceAsync  = "async"
	minAuditMiB    = 64
	logKeyFolder   = "log-1" // in keys; there is one for as long as there is the log

	verifyTries = 3
	verifyPause = 100 * time.Millisecond
)

func (c Config) auditPath() string { return filepath.Join(c.DataDir, "audit.jsonl") }

func (c Config) auditOptions() audit.Options {
	return audit.Options{
		ReserveBytes: c.diskReserve(), Async: c.IssuanceLog == issuanceAsync, MaxAge: c.AuditMaxAge,
		MaxBytes: int64(c.AuditMaxMiB) << 20, Logger: c.Logger,
	}
}

// openAudit opens the log, and sees whether it is a new one.
func (p *parts) openAudit(cfg Config) error {
	first, err := cfg.beginOfLog()
	if err != nil {
		return err
	}
	p.newLog = first == 0
	p.audit, err = audit.Open(cfg.auditPath(), cfg.auditOptions())
	return err
}

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

// beginOfLog is the first record of the log, 0 where it is to begin with the next
// one: another log under a key that has signed for a lost one would contradict it.
// A first start that was killed after it made the key has left a file with nothing
// in it, and no later keys.
func (c Config) beginOfLog() (uint64, error) {
	first, err := audit.Begin(c.auditPath())
	missing := errors.Is(err, os.ErrNotExist)
	if err != nil && !missing {
		return 0, fmt.Errorf("open audit log: %w", err)
	}
	key := filepath.Join(c.keysDir(), logKeyFolder)
	if first > 0 || !exists(key) {
		return first, nil
	}
	if missing {
		return 0, &LostLogError{c.auditPath(), key}
	}
	if later := c.laterKeys(); later != "" {
		return 0, &LostLogError{c.auditPath(), later}
	}
	return 0, nil
}

// checkAudit: what an SVID was issued by stays for as long as the SVID lives.
func (c Config) checkAudit() error {
	switch {
	case c.IssuanceLog != issuanceStrict && c.IssuanceLog != issuanceAsync:
		return fmt.Errorf("issuance_log: %q is neither %s nor %s", c.IssuanceLog, issuanceStrict, issuanceAsync)
	case c.AuditMaxAge < entry.MaxX509SVIDTTL:
		return fmt.Errorf("audit_max_age: %s is shorter than an SVID can live, %s", c.AuditMaxAge, entry.MaxX509SVIDTTL)
	case c.AuditMaxMiB < minAuditMiB:
		return fmt.Errorf("audit_max_mib: %d is less than %d", c.AuditMaxMiB, minAuditMiB)
	}
	return nil
}

// LogReport says how far an audit log is good.
type LogReport struct {
	Path string
	// Problem says what is wrong; empty: all is there.
	Problem string
	// First and Last are the good records; those before First were dropped.
	First, Last uint64
	// Size is how many records the last saved checkpoint counts, and Root the
	// root hash of their tree; Origin names the log, VerifierKey is its key, and
	// RootHash that of the root which vouches for the key. A log without a
	// checkpoint has none of them.
	Size        int64
	Root        string
	Origin      string
	VerifierKey string
	RootHash    string
	// Unfinished are administrative acts that begin and have no outcome: the CA
	// was killed in them, or is at them now.
	Unfinished []UnfinishedAct
}

// UnfinishedAct is the record that an act begins with.
type UnfinishedAct struct {
	Seq                uint64
	Time               time.Time
	Actor, Detail, Act string
}

// VerifyAuditLog reads the whole audit log of cfg, also of a CA that runs. The
// error is for one that cannot be read.
func VerifyAuditLog(cfg Config) (LogReport, error) {
	path := cfg.auditPath()
	if _, err := os.Stat(path); err != nil {
		return LogReport{}, fmt.Errorf("verify the audit log: %w", err)
	}
	r, err := audit.Verify(path)
	// The CA may be writing a line, or turning to the next file.
	for try := 1; err != nil && try < verifyTries; try++ {
		time.Sleep(verifyPause)
		r, err = audit.Verify(path)
	}
	report := LogReport{Path: path, First: r.First, Last: r.Last}
	for _, u := range r.Unfinished {
		report.Unfinished = append(report.Unfinished, UnfinishedAct(u))
	}
	if err != nil {
		report.Problem = err.Error()
	}
	if r.RootHash == "" {
		return report, nil
	}
	report.Size, report.Root, report.Origin, report.RootHash = r.Checkpoint.Size, r.Checkpoint.Root.String(), r.Checkpoint.Origin, r.RootHash
	report.VerifierKey, err = r.Key.VerifierKey()
	return report, err
}

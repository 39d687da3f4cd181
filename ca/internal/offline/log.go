// How far an audit log is good: merlon log verify.

package offline

import (
	"fmt"
	"os"
	"time"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
)

const (
	verifyTries = 3
	verifyPause = 100 * time.Millisecond
)

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
func VerifyAuditLog(cfg config.Config) (LogReport, error) {
	path := cfg.AuditPath()
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

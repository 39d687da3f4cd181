// The settings of the logs: what was issued and done, and what was decided.

package config

import (
	"fmt"
	"path/filepath"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
)

// The ways of issuance_log.
const (
	issuanceStrict = "strict"
	issuanceAsync  = "async"
)

const minAuditMiB = 64

// AuditPath is the file of the audit log.
func (c Config) AuditPath() string { return filepath.Join(c.DataDir, "audit.jsonl") }

// AuditOptions are those by which the audit log is opened.
func (c Config) AuditOptions() audit.Options {
	return audit.Options{
		ReserveBytes: c.DiskReserve(), Async: c.IssuanceLog == issuanceAsync, MaxAge: c.AuditMaxAge,
		MaxBytes: int64(c.AuditMaxMiB) << 20, Logger: c.Logger,
	}
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

func (c Config) checkDecisionLog() error {
	switch {
	case c.DecisionLogFile != "" && !filepath.IsAbs(c.DecisionLogFile):
		return fmt.Errorf("decision_log_file: %q is not an absolute path", c.DecisionLogFile)
	case c.DecisionLogMaxMiB < 1:
		return fmt.Errorf("decision_log_max_mib: %d is less than 1", c.DecisionLogMaxMiB)
	case c.DecisionLogKeep < 1:
		return fmt.Errorf("decision_log_keep: %d is less than 1", c.DecisionLogKeep)
	}
	return nil
}

// What the configuration says about the audit log.

package ca

import (
	"fmt"
	"path/filepath"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
)

const (
	issuanceStrict = "strict"
	issuanceAsync  = "async"
	minAuditMiB    = 64
)

func (c Config) auditPath() string { return filepath.Join(c.DataDir, "audit.jsonl") }

func (c Config) auditOptions() audit.Options {
	return audit.Options{
		ReserveBytes: c.diskReserve(), Async: c.IssuanceLog == issuanceAsync, MaxAge: c.AuditMaxAge,
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

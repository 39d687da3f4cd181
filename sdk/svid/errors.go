// Why a document is refused: the number of the broken rule and a sentence.

package svid

import (
	"crypto/x509"
	"errors"
	"fmt"
)

// Error says that a presented document does not prove a SPIFFE ID.
type Error struct {
	// Rule is the number of the rule that the document breaks, e.g. "X4" for a
	// leaf without a path. "CAP" means that a size limit stopped it before any
	// signature was looked at.
	Rule string
	// Reason completes the sentence "refused because …". It may quote the
	// document, always escaped.
	Reason string
	// Err is the cause, where another library found it.
	Err error

	expired bool
}

// Error implements error.
func (e *Error) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("SVID refused (%s): %s: %v", e.Rule, e.Reason, e.Err)
	}
	return fmt.Sprintf("SVID refused (%s): %s", e.Rule, e.Reason)
}

// Unwrap gives the cause, if another library found it.
func (e *Error) Unwrap() error { return e.Err }

// Expired says whether time is what is wrong with the document: it has run out,
// or is not valid yet. A fresh one may be accepted.
func (e *Error) Expired() bool {
	if e.expired {
		return true
	}
	var invalid x509.CertificateInvalidError
	return errors.As(e.Err, &invalid) && invalid.Reason == x509.Expired
}

func refuse(rule, format string, args ...any) *Error {
	return &Error{Rule: rule, Reason: fmt.Sprintf(format, args...)}
}

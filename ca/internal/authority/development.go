// The mark of a root that nobody should trust: every tool that prints a
// certificate shows it.

package authority

import (
	"crypto/x509"
	"slices"
)

// DevelopmentOrganization is the organization in the subject of every signing
// certificate of a CA that was started for development.
const DevelopmentOrganization = "Merlon development root - do not trust"

// IsDevelopment says whether a signing certificate has that mark.
func IsDevelopment(cert *x509.Certificate) bool {
	return slices.Contains(cert.Subject.Organization, DevelopmentOrganization)
}

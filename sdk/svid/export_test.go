package svid

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// Issuers is how many intermediates of a trust domain t remembers.
func (t *Trust) Issuers(td spiffeid.TrustDomain) int {
	s := t.anchors[td].issuers
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.known)
}

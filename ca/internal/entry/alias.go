// Aliases: SPIFFE IDs that stand for each node with certain selectors. An entry
// makes one, its parent is the CA, and entries that have the alias as their parent
// concern every node that the alias stands for. Nobody gets an SVID for an alias.

package entry

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// aliasPrefix lies among the agents' names: no kind of evidence is called alias.
const aliasPrefix = agentPrefix + "/alias/"

// IsAlias says whether id is that of an alias.
func IsAlias(id spiffeid.ID) bool {
	name, ok := strings.CutPrefix(id.Path(), aliasPrefix)
	return ok && name != "" && len(name) <= maxNameLen
}

// Alias says whether e makes an alias.
func (e *Entry) Alias() bool { return IsAlias(e.SPIFFEID) }

// StandsFor says whether the alias that e makes stands for a node of which have
// is proved.
func (e *Entry) StandsFor(have []Selector) bool {
	if !e.Alias() || len(e.Selectors) == 0 {
		return false
	}
	for _, want := range e.Selectors {
		if !slices.Contains(have, want) {
			return false
		}
	}
	return true
}

// validateAlias is Validate of an entry that makes an alias.
func (e *Entry) validateAlias(td spiffeid.TrustDomain, now time.Time) *InvalidError {
	switch {
	case !e.SPIFFEID.MemberOf(td):
		return invalid("spiffe_id", "%s is not in the trust domain %s", e.SPIFFEID, td)
	case e.ParentID != CAID(td):
		return invalid("parent_id", "%s makes an alias, whose parent is %s", e.SPIFFEID, CAID(td))
	case e.X509SVIDTTL != 0:
		return invalid("x509_svid_ttl_seconds", "%s is an alias, which has no SVID", e.SPIFFEID)
	case e.JWTSVIDTTL != 0:
		return invalid("jwt_svid_ttl_seconds", "%s is an alias, which has no SVID", e.SPIFFEID)
	case len(e.DNSNames) > 0:
		return invalid("dns_names", "%s is an alias, which has no SVID", e.SPIFFEID)
	case e.CommonName != "":
		return invalid("common_name", "%s is an alias, which has no SVID", e.SPIFFEID)
	case len(e.FederatesWith) > 0:
		return invalid("federates_with", "%s is an alias, which verifies nobody", e.SPIFFEID)
	case e.Role.Name != "":
		return invalid("role", "%s is an alias, which administers nothing", e.SPIFFEID)
	}
	if err := checkSelectors(nodeKinds, e.Selectors); err != nil {
		return err
	}
	if err := checkText("hint", e.Hint, maxHintBytes); err != nil {
		return err
	}
	return e.checkExpiry(now)
}

// known are the selectors that e can have: of nodes, where it makes an alias, or
// of workloads.
func (e *Entry) known() map[string]map[string]func(string) string {
	if e.Alias() {
		return nodeKinds
	}
	return attestors
}

// checkWorkloadSelectors also says where a fact about nodes belongs.
func checkWorkloadSelectors(selectors []Selector) *InvalidError {
	err := checkSelectors(attestors, selectors)
	if err == nil {
		return nil
	}
	for _, sel := range selectors {
		if checkAgainst(attestors, sel) != nil && checkAgainst(nodeKinds, sel) == nil {
			return invalid("selectors", "%q is a fact about nodes: give it to an entry that makes an alias of them (spiffe://…%sNAME), and make that the parent of this one", sel, aliasPrefix)
		}
	}
	return err
}

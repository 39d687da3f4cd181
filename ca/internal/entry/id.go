// SPIFFE IDs as operators give them: taken literally or refused, never
// repaired (SECURITY.md T1, ID1-ID7), and the IDs that Merlon keeps for itself.

package entry

import (
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	agentPrefix = "/agent"
	caPath      = "/ca"
	maxNameLen  = 128 // of a name that an operator chose
	// maxAttestedLen is for names that attestors make.
	maxAttestedLen = 256
)

// ParseID parses a SPIFFE ID of the API's field. The error is an
// *InvalidError.
func ParseID(field, s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, invalid(field, "is missing")
	}
	if len(s) > maxIDBytes {
		return spiffeid.ID{}, invalid(field, "has %d bytes; a SPIFFE ID has at most %d", len(s), maxIDBytes)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, invalid(field, "%q is not a SPIFFE ID: %s", s, err)
	}
	if n := len(id.TrustDomain().Name()); n > maxTrustDomainBytes {
		return spiffeid.ID{}, invalid(field, "the trust domain has %d bytes; at most %d", n, maxTrustDomainBytes)
	}
	return id, nil
}

// ParseTrustDomain parses the bare name of a trust domain, such as
// "example.org".
func ParseTrustDomain(field, s string) (spiffeid.TrustDomain, error) {
	if len(s) > maxTrustDomainBytes {
		return spiffeid.TrustDomain{}, invalid(field, "has %d bytes; at most %d", len(s), maxTrustDomainBytes)
	}
	// go-spiffe would take a whole SPIFFE ID here and cut it.
	if strings.Contains(s, "/") || strings.Contains(s, ":") {
		return spiffeid.TrustDomain{}, invalid(field, "%q is not a trust domain: give the bare name, such as example.org", s)
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, invalid(field, "%q is not a trust domain: %s", s, err)
	}
	return td, nil
}

// AgentID returns the SPIFFE ID of the agent called name, which an operator
// chose: one segment. The error is an *InvalidError.
func AgentID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	if name == "" || len(name) > maxNameLen {
		return spiffeid.ID{}, invalid("agent_name", "has %d bytes; 1 to %d", len(name), maxNameLen)
	}
	id, err := spiffeid.FromSegments(td, agentPrefix[1:], name)
	if err != nil {
		return spiffeid.ID{}, invalid("agent_name", "%q cannot be a path segment of a SPIFFE ID: %s", name, err)
	}
	return id, nil
}

// AttestedID returns the SPIFFE ID of an agent whose evidence is of kind, and
// names the node by segments. It has at least one more segment than any name
// that an operator chose, so the two never meet. The error is an *InvalidError.
func AttestedID(td spiffeid.TrustDomain, kind string, segments ...string) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(td, append([]string{agentPrefix[1:], kind}, segments...)...)
	if err != nil || len(segments) == 0 {
		return spiffeid.ID{}, invalid("agent", "%q cannot be the name of a node: %v", segments, err)
	}
	if _, ok := AgentName(id); !ok {
		return spiffeid.ID{}, invalid("agent", "%q is no name of a node, or has more than %d bytes", segments, maxAttestedLen)
	}
	return id, nil
}

// AgentName returns the name in an agent's SPIFFE ID, and false for any other
// ID.
func AgentName(id spiffeid.ID) (string, bool) {
	name, ok := strings.CutPrefix(id.Path(), agentPrefix+"/")
	if !ok || name == "" {
		return "", false
	}
	kind, _, attested := strings.Cut(name, "/")
	if attested {
		return name, nodeKinds[kind] != nil && len(name) <= maxAttestedLen
	}
	return name, len(name) <= maxNameLen
}

// CAID returns the SPIFFE ID under which the CA serves its ports.
func CAID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, caPath)
}

// Reserved says whether id is one of those that Merlon gives out by itself:
// agents and the CA. A workload with such an ID would be taken for one.
func Reserved(id spiffeid.ID) bool {
	p := id.Path()
	return p == caPath || p == agentPrefix || strings.HasPrefix(p, agentPrefix+"/")
}

// checkFederatesWith takes names of trust domains, whether or not anything is known
// of them yet.
func checkFederatesWith(names []string, own spiffeid.TrustDomain) *InvalidError {
	const field = "federates_with"
	if len(names) > maxFederatesWith {
		return invalid(field, "holds %d trust domains; at most %d", len(names), maxFederatesWith)
	}
	for i, name := range names {
		td, err := ParseTrustDomain(field, name)
		if e, ok := errors.AsType[*InvalidError](err); ok {
			return e
		}
		switch {
		case td == own:
			return invalid(field, "%q is the CA's own trust domain, whose SVIDs every workload verifies", name)
		case slices.Contains(names[:i], name):
			return invalid(field, "%q is there twice", name)
		}
	}
	return nil
}

func checkWorkloadID(field string, id spiffeid.ID, td spiffeid.TrustDomain) *InvalidError {
	switch {
	case id.IsZero():
		return invalid(field, "is missing")
	case len(id.String()) > maxIDBytes:
		return invalid(field, "has %d bytes; a SPIFFE ID has at most %d", len(id.String()), maxIDBytes)
	case !id.MemberOf(td):
		return invalid(field, "%s is not in the trust domain %s", id, td)
	case id.Path() == "":
		return invalid(field, "%s has no path: it names the trust domain, not a workload", id)
	case Reserved(id):
		return invalid(field, "%s is reserved: Merlon gives %s/… and %s out itself", id, agentPrefix, caPath)
	}
	return nil
}

func checkParent(id spiffeid.ID, td spiffeid.TrustDomain) *InvalidError {
	switch {
	case id.IsZero():
		return invalid("parent_id", "is missing")
	case !id.MemberOf(td):
		return invalid("parent_id", "%s is not in the trust domain %s", id, td)
	}
	if _, ok := AgentName(id); !ok && !IsAlias(id) {
		return invalid("parent_id", "%s is neither an agent nor an alias: want spiffe://%s%s/NAME, as `merlon agent list` shows it", id, td.Name(), agentPrefix)
	}
	return nil
}

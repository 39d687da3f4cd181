package grant

// This file is what grants mean, in plain Go: the reference that the compiled
// policy is compared with.

import (
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
)

// Fit is how much of a call one grant matches, from nothing to all.
type Fit int

// The fits. The nearest miss of a denied call is the greatest of its grants.
const (
	None       Fit = iota // another source, destination or protocol, or expired
	SameParty             // source, destination and protocol
	SamePath              // and the path, but not the method
	Everything            // all
)

// Fit says how much of the call in grant g matches at now. The path of in is
// unambiguous (policy.CheckPath).
func (g *Grant) Fit(in *policy.Input, now time.Time) Fit {
	if g.Protocol() != in.Protocol || g.Expired(now) ||
		!anyMatches(g.From, in.Source, MatchSPIFFEID) || !anyMatches(g.To, in.Destination, MatchSPIFFEID) {
		return None
	}
	path, method, matches := in.Path, in.Method, MatchPath
	if g.GRPC != nil {
		var ok bool
		if path, method, ok = policy.SplitRPC(in.Path); !ok {
			return SameParty
		}
		matches = func(a, b string) bool { return a == b }
	}
	switch {
	case g.TCP != nil:
		return Everything
	case !anyMatches(g.paths(), path, matches):
		return SameParty
	case g.methods() != nil && !slices.Contains(g.methods(), method):
		return SamePath
	}
	return Everything
}

func anyMatches(patterns []string, s string, matches func(pattern, s string) bool) bool {
	return patterns == nil || slices.ContainsFunc(patterns, func(p string) bool { return matches(p, s) })
}

// IsSingle says whether the pattern, of a grant's From or To, is one SPIFFE ID and no
// trust domain or "…/*".
func IsSingle(pattern string) bool {
	return !strings.HasSuffix(pattern, "/*") && strings.Count(pattern, "/") > 2
}

// MatchSPIFFEID reports whether the SPIFFE ID id is what pattern names. It
// goes by whole segments: "spiffe://td/ns/a/*" does not match
// "spiffe://td/ns/a-evil/x" (attack T48).
func MatchSPIFFEID(pattern, id string) bool {
	if below, ok := strings.CutSuffix(pattern, "*"); ok { // ends in "/"
		return len(id) > len(below) && strings.HasPrefix(id, below)
	}
	if pattern == id {
		return true
	}
	return !strings.Contains(pattern[len("spiffe://"):], "/") && strings.HasPrefix(id, pattern+"/")
}

// MatchPath reports whether path is what pattern names. Both are compared
// decoded (policy.DecodePath).
func MatchPath(pattern, path string) bool {
	path = policy.DecodePath(path)
	below, prefix := strings.CutSuffix(pattern, "/*")
	if !strings.Contains(below, "{") {
		below = policy.DecodePath(below)
		if prefix {
			return len(path) > len(below)+1 && strings.HasPrefix(path, below+"/")
		}
		return below == path
	}
	want, got := strings.Split(below, "/"), strings.Split(path, "/")
	if len(got) < len(want) || !prefix && len(got) != len(want) {
		return false
	}
	if prefix && (len(got) == len(want) || got[len(want)] == "") {
		return false
	}
	for i, w := range want {
		if strings.HasPrefix(w, "{") && got[i] == "" || !strings.HasPrefix(w, "{") && got[i] != policy.DecodePath(w) {
			return false
		}
	}
	return true
}

// Outcome is what a set of grants says about one call.
type Outcome struct {
	Allow  bool
	Reason policy.Reason
	// GrantID decided: the least ID of those that match. Empty for no match.
	GrantID string
	// DryRun has the IDs of the matching dry-run grants, sorted.
	DryRun []string
	// Nearest has the enforced allow grants that came nearest to matching a
	// call that none allows, sorted by ID.
	Nearest []*Grant
}

// Decide is the answer of grants to the call in. It looks at every grant.
func Decide(grants []Grant, in *policy.Input, now time.Time) Outcome {
	var out Outcome
	best, allow, deny := None, "", ""
	for i := range grants {
		g := &grants[i]
		fit := g.Fit(in, now)
		switch {
		case fit == None || g.Mode == DryRun && fit < Everything:
		case g.Mode == DryRun:
			out.DryRun = append(out.DryRun, g.ID)
		case g.Effect == Deny:
			if fit == Everything {
				deny = least(deny, g.ID)
			}
		case fit == Everything:
			allow = least(allow, g.ID)
		case fit > best:
			best, out.Nearest = fit, []*Grant{g}
		case fit == best:
			out.Nearest = append(out.Nearest, g)
		}
	}
	slices.Sort(out.DryRun)
	switch {
	case deny != "":
		out.Reason, out.GrantID, out.Nearest = policy.DenyRule, deny, nil
	case allow != "":
		out.Allow, out.Reason, out.GrantID, out.Nearest = true, policy.Allowed, allow, nil
	default:
		out.Reason = map[Fit]policy.Reason{None: policy.NoGrant, SameParty: policy.PathNotGranted, SamePath: policy.MethodNotGranted}[best]
	}
	return out
}

func least(a, b string) string {
	if a == "" || b < a {
		return b
	}
	return a
}

package grant

// This file decides which grants are well formed. A pattern that could never
// match, or that could match more than its writer sees, is refused when the
// policy is built, not found out at the first call.

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/policy"
	"merlon.dev/policy/strictyaml"
)

// Limits of one policy. They bound what a decision can cost.
const (
	MaxGrants    = 100_000
	maxIDBytes   = 200
	maxPathBytes = 4096
	maxListItems = 10_000
)

// Check reports the first grant that is malformed, or whose ID is taken.
func Check(grants []Grant) error {
	if len(grants) > MaxGrants {
		return fmt.Errorf("a policy has at most %d grants, this one has %d", MaxGrants, len(grants))
	}
	first := make(map[string]*Grant, len(grants))
	for i := range grants {
		g := &grants[i]
		if err := g.check(); err != nil {
			return err
		}
		if other := first[g.ID]; other != nil {
			return g.fail(g.Where, "id", "id", "", "is taken by the grant at %s:%d; IDs are unique over all files", other.File, other.Where.Of("id").Line)
		}
		first[g.ID] = g
	}
	return nil
}

func (g *Grant) check() error {
	if reason := checkID(g.ID); reason != "" {
		return g.fail(g.Where, "id", "id", "", "%s", reason)
	}
	if err := g.checkSPIFFEIDs("from", g.From); err != nil {
		return err
	}
	if err := g.checkSPIFFEIDs("to", g.To); err != nil {
		return err
	}
	if err := g.checkProtocol(); err != nil {
		return err
	}
	effects := []string{string(Allow), string(Deny)}
	if !slices.Contains(effects, string(g.Effect)) && (g.Effect != "" || g.Where.Has("effect")) {
		return g.fail(g.Where, "effect", "effect", strictyaml.Suggest(string(g.Effect), effects), "%q is neither allow nor deny", g.Effect)
	}
	modes := []string{string(Enforce), string(DryRun)}
	if !slices.Contains(modes, string(g.Mode)) && (g.Mode != "" || g.Where.Has("mode")) {
		return g.fail(g.Where, "mode", "mode", strictyaml.Suggest(string(g.Mode), modes), "%q is neither enforce nor dry-run", g.Mode)
	}
	return nil
}

func checkID(id string) string {
	switch {
	case id == "":
		return "is missing; every grant has an ID, which decisions show"
	case len(id) > maxIDBytes:
		return fmt.Sprintf("is longer than %d bytes", maxIDBytes)
	case strings.HasPrefix(id, "rego:"):
		return `begins with "rego:", which names Rego rules in decisions`
	case strings.TrimSpace(id) != id || strings.ContainsFunc(id, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Sprintf("%q has characters that cannot be shown, or spaces at an end", id)
	}
	return ""
}

func (g *Grant) checkProtocol() error {
	var set []string
	for name, present := range map[string]bool{"http": g.HTTP != nil, "grpc": g.GRPC != nil, "tcp": g.TCP != nil} {
		if present {
			set = append(set, name)
		}
	}
	if len(set) != 1 {
		slices.Sort(set)
		return g.fail(g.Where, strings.Join(set, ""), "protocol", "", "needs exactly one of http, grpc and tcp, has %d; tcp: {} means connections without a known protocol", len(set))
	}
	switch {
	case g.HTTP != nil:
		if err := g.checkList(g.HTTP.Where, "http.methods", g.HTTP.Methods, checkMethod); err != nil {
			return err
		}
		return g.checkList(g.HTTP.Where, "http.paths", g.HTTP.Paths, checkPathPattern)
	case g.GRPC != nil:
		if err := g.checkList(g.GRPC.Where, "grpc.services", g.GRPC.Services, checkService); err != nil {
			return err
		}
		return g.checkList(g.GRPC.Where, "grpc.methods", g.GRPC.Methods, checkRPC)
	}
	return nil
}

func (g *Grant) checkSPIFFEIDs(field string, patterns []string) error {
	return g.checkList(g.Where, field, patterns, checkSPIFFEIDPattern)
}

// checkList refuses empty lists, which people write when they mean nobody and
// when they mean everybody, and applies check to each item.
func (g *Grant) checkList(where strictyaml.Position, field string, items []string, check func(string) (reason, suggestion string)) error {
	key := field[strings.LastIndexByte(field, '.')+1:]
	switch {
	case items == nil:
		return nil
	case len(items) == 0:
		return g.fail(where, key, field, "", "is empty; leave %s out to mean any", key)
	case len(items) > maxListItems:
		return g.fail(where, key, field, "", "has more than %d items", maxListItems)
	}
	for i, item := range items {
		if reason, suggestion := check(item); reason != "" {
			return g.fail(where, key, fmt.Sprintf("%s[%d]", field, i), suggestion, "%.300q %s", item, reason)
		}
		if slices.Contains(items[:min(i, 100)], item) {
			return g.fail(where, key, fmt.Sprintf("%s[%d]", field, i), "", "%.300q stands in the list twice", item)
		}
	}
	return nil
}

// checkSPIFFEIDPattern holds patterns to SPIFFE-ID sections 2.1 to 2.3 (ID1 to
// ID7) with a "/*" at the end as the only addition.
func checkSPIFFEIDPattern(p string) (reason, suggestion string) {
	base := strings.TrimSuffix(p, "/*")
	if strings.Contains(base, "*") {
		return `has "*" elsewhere than as the whole last segment`, ""
	}
	if err := checkSPIFFEID(base); err != nil {
		if !strings.Contains(p, "://") && checkSPIFFEID("spiffe://"+base) == nil {
			suggestion = "spiffe://" + p
		}
		return fmt.Sprintf("is not a SPIFFE ID: %v", err), suggestion
	}
	return "", ""
}

func checkSPIFFEID(s string) error {
	if len(s) > 2048 {
		return fmt.Errorf("longer than 2048 bytes")
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return err
	}
	if len(id.TrustDomain().Name()) > 255 {
		return fmt.Errorf("trust domain longer than 255 bytes")
	}
	if id.String() != s {
		return fmt.Errorf("not in canonical form")
	}
	return nil
}

// checkMethod is the token of RFC 9110 section 9.1.
func checkMethod(m string) (reason, suggestion string) {
	if m == "*" {
		return "is no method; leave methods out to mean any", ""
	}
	if m == "" || len(m) > 64 || strings.ContainsFunc(m, func(r rune) bool { return !tokenCharacter(r) }) {
		return "is not an HTTP method such as GET", ""
	}
	return "", ""
}

func tokenCharacter(r rune) bool {
	return r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
}

var (
	serviceName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)
	rpcName     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	segmentName = regexp.MustCompile(`^\{[A-Za-z_][A-Za-z0-9_]*\}$`)
)

func checkService(s string) (reason, suggestion string) {
	switch {
	case s == "*":
		return "is no service; leave services out to mean any", ""
	case !serviceName.MatchString(s):
		return "is not the full name of a gRPC service such as shop.Orders", ""
	}
	return "", ""
}

func checkRPC(m string) (reason, suggestion string) {
	switch {
	case m == "*":
		return "is no method; leave methods out to mean any", ""
	case !rpcName.MatchString(m):
		return "is not the name of a gRPC method such as Get", ""
	}
	return "", ""
}

// checkPathPattern refuses patterns that could only match paths which are
// refused as ambiguous before any grant is asked.
func checkPathPattern(p string) (reason, suggestion string) {
	if len(p) > maxPathBytes {
		return fmt.Sprintf("is longer than %d bytes", maxPathBytes), ""
	}
	if p == "*" {
		return "is no path pattern", "/*"
	}
	base, _ := strings.CutSuffix(p, "/*")
	if base == "" && p != "" {
		return "", "" // "/*"
	}
	segments := strings.Split(base, "/")
	for i, s := range segments {
		switch {
		case strings.Contains(s, "*"):
			return `has "*" elsewhere than as the whole last segment`, ""
		case segmentName.MatchString(s):
			segments[i] = "x"
		case strings.ContainsAny(s, "{}"):
			return `has a "{" or "}" that is not a whole segment such as {id}`, ""
		}
	}
	if err := policy.CheckPath(strings.Join(segments, "/")); err != nil {
		if !strings.HasPrefix(p, "/") {
			suggestion = "/" + p
		}
		return "could only match paths that are refused: " + err.Error(), suggestion
	}
	if base != p && strings.HasSuffix(base, "/") {
		return `has an empty segment before "/*"`, ""
	}
	return "", ""
}

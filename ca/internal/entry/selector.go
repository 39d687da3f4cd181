// Selectors: proved facts about a workload. A selector that no attestor can
// ever prove is a typing mistake that would leave a workload without identity,
// so it is refused with the nearest right word.

package entry

import (
	"encoding/hex"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Selector is one fact about a workload, written type:value, such as
// unix:uid:1000.
type Selector struct {
	Type  string // "unix"
	Value string // "uid:1000"
}

// String returns type:value.
func (s Selector) String() string { return s.Type + ":" + s.Value }

const maxSelectorBytes = 4096

// attestors lists, by selector type, what the agent's workload attestors can
// prove, with the check of each value.
var attestors = map[string]map[string]func(string) string{
	"unix": {
		"uid":                 numericID,
		"user":                accountName,
		"gid":                 numericID,
		"group":               accountName,
		"supplementary_gid":   numericID,
		"supplementary_group": accountName,
		"path":                absolutePath,
		"sha256":              sha256Hex,
	},
	"systemd":   {"unit": unitName},
	"container": {"id": sha256Hex, "runtime": oneOf("docker", "containerd", "cri-o", "podman")},
	"k8s": {
		"pod-uid": podUID,
		"qos":     oneOf("guaranteed", "burstable", "besteffort"),
		// These the agent asks the kubelet for.
		"ns":              dnsLabel,
		"sa":              dnsName,
		"pod-name":        dnsName,
		"pod-label":       podLabel,
		"pod-owner":       podOwner,
		"node-name":       dnsName,
		"container-name":  dnsLabel,
		"container-image": imageName,
	},
}

// ParseSelector parses type:value. It splits at the first colon and refuses a
// type or key that no attestor proves, as an *InvalidError.
func ParseSelector(s string) (Selector, error) { return parseSelector(attestors, s) }

func parseSelector(known map[string]map[string]func(string) string, s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok {
		return Selector{}, invalid("selectors", "%q has no colon: want type:value, such as unix:uid:1000", s)
	}
	sel := Selector{Type: typ, Value: value}
	if err := checkAgainst(known, sel); err != nil {
		return Selector{}, err
	}
	return sel, nil
}

func checkSelectors(known map[string]map[string]func(string) string, selectors []Selector) *InvalidError {
	if len(selectors) == 0 {
		return invalid("selectors", "there is none: an entry without selectors would match nothing")
	}
	if len(selectors) > maxSelectors {
		return invalid("selectors", "there are %d; at most %d", len(selectors), maxSelectors)
	}
	seen := make(map[Selector]bool, len(selectors))
	for _, sel := range selectors {
		if err := checkAgainst(known, sel); err != nil {
			return err
		}
		if seen[sel] {
			return invalid("selectors", "%q is there twice", sel)
		}
		seen[sel] = true
	}
	return nil
}

// checkAgainst says why no attestor of those known could ever prove sel.
func checkAgainst(known map[string]map[string]func(string) string, sel Selector) *InvalidError {
	if n := len(sel.Type) + 1 + len(sel.Value); n > maxSelectorBytes {
		return invalid("selectors", "one has %d bytes; at most %d", n, maxSelectorBytes)
	}
	keys, ok := known[sel.Type]
	if !ok {
		return invalid("selectors", "%q has the unknown type %q%s", sel, sel.Type, suggest(sel.Type, known))
	}
	key, value, ok := strings.Cut(sel.Value, ":")
	check := keys[key]
	if !ok || check == nil {
		return invalid("selectors", "%q: %s has no %q%s", sel, sel.Type, key, suggest(key, keys))
	}
	if reason := check(value); reason != "" {
		return invalid("selectors", "%q: %s", sel, reason)
	}
	return nil
}

func numericID(s string) string {
	n, err := strconv.ParseUint(s, 10, 32)
	// 2^32-1 is "no user" to the kernel.
	if err != nil || strconv.FormatUint(n, 10) != s || n == 1<<32-1 {
		return "want a number between 0 and 4294967294, in decimal"
	}
	return ""
}

func absolutePath(s string) string {
	if err := checkText("path", s, maxSelectorBytes); err != nil {
		return err.Reason
	}
	if !path.IsAbs(s) || path.Clean(s) != s || s == "/" {
		return "want the absolute path of the program, as the kernel shows it: without symlinks, dots or a trailing slash"
	}
	return ""
}

func sha256Hex(s string) string {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 || strings.ToLower(s) != s {
		return "want 64 lower-case hex digits"
	}
	return ""
}

// accountName is a user or group as the agent finds it in /etc/passwd or
// /etc/group.
func accountName(s string) string {
	if s == "" || len(s) > 256 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }) {
		return "want the name of an account of the node"
	}
	return ""
}

var unitPattern = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,240}\.(service|scope|socket|mount|swap)$`)

func unitName(s string) string {
	if !unitPattern.MatchString(s) {
		return "want the name of a unit with its suffix, such as nginx.service"
	}
	return ""
}

var podPattern = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})$`)

func podUID(s string) string {
	if !podPattern.MatchString(s) {
		return "want the UID of a pod, in lower case: kubectl get pod NAME -o jsonpath={.metadata.uid}"
	}
	return ""
}

// Names as Kubernetes has them, in what it calls DNS labels and subdomains, and
// labels of objects.
var (
	labelPattern     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	subdomainPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
	namePattern      = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)
	kindPattern      = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]{0,62}$`)
)

func dnsLabel(s string) string {
	if !labelPattern.MatchString(s) {
		return "want a name as Kubernetes has it: at most 63 lower-case letters, digits and hyphens"
	}
	return ""
}

func dnsName(s string) string {
	if len(s) > 253 || !subdomainPattern.MatchString(s) {
		return "want a name as Kubernetes has it: lower-case letters, digits, hyphens and dots"
	}
	return ""
}

func podLabel(s string) string {
	key, value, ok := strings.Cut(s, ":")
	prefix, name, prefixed := strings.Cut(key, "/")
	if !prefixed {
		prefix, name = "", key
	}
	if !ok || prefixed && dnsName(prefix) != "" || !namePattern.MatchString(name) || value != "" && !namePattern.MatchString(value) {
		return "want KEY:VALUE of a pod's label, such as k8s:pod-label:app.kubernetes.io/name:web"
	}
	return ""
}

func podOwner(s string) string {
	kind, name, _ := strings.Cut(s, ":")
	if !kindPattern.MatchString(kind) || dnsName(name) != "" {
		return "want KIND:NAME of what made the pod, such as k8s:pod-owner:StatefulSet:db"
	}
	return ""
}

func imageName(s string) string {
	if s == "" || len(s) > 1024 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "want the name of an image as the kubelet has it: kubectl get pod NAME -o jsonpath={.status.containerStatuses[*].image}"
	}
	return ""
}

func oneOf(words ...string) func(string) string {
	return func(s string) string {
		if !slices.Contains(words, s) {
			return "want one of " + strings.Join(words, ", ")
		}
		return ""
	}
}

// suggest names the known word nearest to got, or all of them.
func suggest[V any](got string, known map[string]V) string {
	words := make([]string, 0, len(known))
	for w := range known {
		words = append(words, w)
	}
	slices.Sort(words)
	best, bestDistance := "", 3
	for _, w := range words {
		if d := distance(got, w); d < bestDistance {
			best, bestDistance = w, d
		}
	}
	if best != "" {
		return "; did you mean " + best + "?"
	}
	return "; known: " + strings.Join(words, ", ")
}

// distance is the Levenshtein distance in bytes; anything long is far.
func distance(a, b string) int {
	if len(a) > 32 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

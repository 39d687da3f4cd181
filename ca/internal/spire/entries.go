// Registration entries: each of SPIRE's becomes one here, or a remark that says why
// not.

package spire

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/role"
)

// Entry is a registration entry as it should be here.
type Entry struct {
	entry.Entry
	// Was is the ID of SPIRE's entry, and Line where that begins.
	Was  string
	Line int
}

// Entries translates what `spire-server entry show -output json` printed. Aliases
// come before the entries below them. known says what SPIRE's agents are called here,
// where their names do not say so; an expired entry at now is left out.
func Entries(file string, data []byte, known map[string]string, now time.Time) ([]Entry, []Remark, error) {
	all, err := readShown(file, data)
	if err != nil {
		return nil, nil, err
	}
	t := &translation{remarks: remarks{file: file}, parents: parents{}, known: known, now: now, seen: map[string]string{}, told: map[string]bool{}}
	for id, ours := range known {
		t.parents[id] = parent{id: ours}
	}
	for i := range all {
		if all[i].isAlias() {
			t.alias(&all[i])
		}
	}
	for i := range all {
		if !all[i].isAlias() {
			t.workload(&all[i])
		}
	}
	slices.SortStableFunc(t.list, func(a, b Remark) int { return a.Line - b.Line })
	return t.entries, t.list, nil
}

// translation is one run over all entries.
type translation struct {
	remarks
	parents parents
	known   map[string]string
	now     time.Time
	entries []Entry
	seen    map[string]string // by who gets what: SPIRE's entry
	told    map[string]bool   // notes about parents
}

// alias translates a node alias, and remembers what entries below it have as parent.
func (t *translation) alias(e *shown) {
	if said, ok := t.known[e.spiffeID]; ok {
		t.note(e.line, e.name(), "it is no alias here, but %s, as --parent says", said)
		return
	}
	err := e.unfit(t.now)
	var ours parent
	made := false
	if err == nil {
		ours, made, err = t.parents.alias(e)
	}
	var selectors []entry.Selector
	if err == nil && made {
		if selectors, err = translateAll(e.selectors, nodeSelector); err == nil {
			err = t.add(e, entry.Entry{Selectors: selectors, ExpiresAt: e.end()}, ours.id, "")
		}
	}
	if err != nil {
		t.missing(e.line, e.name(), "%v", err)
		t.lose(e, err)
		return
	}
	t.parents[e.spiffeID] = ours
	if e.admin || e.x509TTL != 0 || e.jwtTTL != 0 || len(e.dnsNames)+len(e.federatesWith) > 0 || e.hint != "" {
		t.note(e.line, e.name(), "an alias of nodes has no SVID here: admin, x509_svid_ttl, jwt_svid_ttl, dns_names, federates_with and hint are left out")
	}
	if !made {
		t.note(e.line, e.name(), "it stands for one node, which is %s: entries below it have that as their parent", ours.id)
		t.tell(e, ours)
	}
}

// lose remembers that the alias is nothing here, unless another entry makes it.
func (t *translation) lose(e *shown, err error) {
	if _, ok := t.parents[e.spiffeID]; !ok {
		t.parents[e.spiffeID] = parent{lost: fmt.Sprintf("its entry has no equivalent (%v)", err)}
	}
}

func (t *translation) workload(e *shown) {
	err := e.unfit(t.now)
	var ours parent
	if err == nil {
		ours, err = t.parents.of(e.parentID)
	}
	var selectors []entry.Selector
	if err == nil {
		selectors, err = translateAll(e.selectors, workloadSelector)
	}
	if err != nil {
		t.missing(e.line, e.name(), "%v", err)
		return
	}
	t.tell(e, ours)
	x := entry.Entry{
		Selectors: selectors, Hint: e.hint, ExpiresAt: e.end(),
		X509SVIDTTL: t.ttl(e, "x509_svid_ttl", e.x509TTL, entry.MaxX509SVIDTTL),
		JWTSVIDTTL:  t.ttl(e, "jwt_svid_ttl", e.jwtTTL, entry.MaxJWTSVIDTTL),
	}
	x.DNSNames = t.lowered(e)
	x.FederatesWith = t.federatesWith(e)
	if e.admin {
		x.Role = role.Role{Name: role.Operator}
	}
	if err := t.add(e, x, e.spiffeID, ours.id); err != nil {
		t.missing(e.line, e.name(), "%v", err)
	}
}

// unfit says why an entry of its kind is not made here at all.
func (e *shown) unfit(now time.Time) error {
	switch {
	case len(e.broken) > 0:
		return fmt.Errorf("%s", strings.Join(e.broken, "; "))
	case len(e.unknown) > 0:
		return fmt.Errorf("unknown keys %s: what they say of whom the entry is for is not known", strings.Join(e.unknown, ", "))
	case e.downstream:
		return fmt.Errorf("downstream: it makes a SPIRE server an intermediate CA. Here that is a nested CA, which joins by: merlon token create --kind nested-ca --name NAME")
	case e.storeSVID:
		return fmt.Errorf("store_svid: SVIDs are not put into secret stores of clouds here; workloads get them from the Workload API")
	case len(e.selectors) == 0:
		return fmt.Errorf("it has no selectors, and would match nothing")
	case e.expiresAt > maxUnix:
		return fmt.Errorf("expires_at: %d is after the year 9999", e.expiresAt)
	case e.expiresAt != 0 && !now.Before(e.end()):
		return fmt.Errorf("expires_at: it ended at %s", e.end().Format(time.RFC3339))
	}
	return nil
}

// maxUnix is the end of the year 9999.
const maxUnix = 253402300799

// tell says once what has to be done for a parent.
func (t *translation) tell(e *shown, p parent) {
	if p.note != "" && !t.told[p.id] {
		t.told[p.id] = true
		t.note(e.line, e.name(), "its parent is %s here; %s", p.id, p.note)
	}
}

// ttl is seconds, at most what is issued here.
func (t *translation) ttl(e *shown, key string, seconds int64, longest time.Duration) time.Duration {
	if seconds > int64(longest/time.Second) {
		t.note(e.line, e.name(), "%s: %d s becomes %s, the longest here", key, seconds, longest)
		return longest
	}
	return time.Duration(seconds) * time.Second
}

func (t *translation) lowered(e *shown) []string {
	var names []string
	for _, name := range e.dnsNames {
		low := strings.ToLower(name)
		if low != name {
			t.note(e.line, e.name(), "dns_names: %q becomes %q; DNS does not tell them apart", name, low)
		}
		if !slices.Contains(names, low) {
			names = append(names, low)
		}
	}
	return names
}

// federatesWith are bare names here, and never the own trust domain.
func (t *translation) federatesWith(e *shown) []string {
	own, _ := split(e.spiffeID)
	var names []string
	for _, td := range e.federatesWith {
		name := strings.TrimPrefix(td, "spiffe://")
		switch {
		case name == own:
			t.note(e.line, e.name(), "federates_with: %s is its own trust domain, which every workload verifies", name)
		case !slices.Contains(names, name):
			names = append(names, name)
		}
	}
	return names
}

// add checks x as the CA would, and takes it in. An alias has no parent but the CA.
func (t *translation) add(e *shown, x entry.Entry, id, parentID string) error {
	spiffeID, err := entry.ParseID("spiffe_id", id)
	if err == nil {
		x.SPIFFEID, x.ParentID = spiffeID, entry.CAID(spiffeID.TrustDomain())
		if parentID != "" {
			x.ParentID, err = entry.ParseID("parent_id", parentID)
		}
	}
	if err == nil {
		x.Selectors = unique(x.Selectors)
		err = x.Validate(spiffeID.TrustDomain(), t.now)
	}
	if err != nil {
		return fmt.Errorf("a CA of Merlon refuses it: %v", err)
	}
	key := Key(x.SPIFFEID, x.ParentID, x.Selectors)
	if before, ok := t.seen[key]; ok {
		t.note(e.line, e.name(), "it is the same here as entry %s, and is made once", before)
		return nil
	}
	t.seen[key] = e.id
	t.entries = append(t.entries, Entry{x, e.id, e.line})
	return nil
}

func unique(selectors []entry.Selector) []entry.Selector {
	var out []entry.Selector
	for _, sel := range selectors {
		if !slices.Contains(out, sel) {
			out = append(out, sel)
		}
	}
	return out
}

// Key tells entries apart as SPIRE does: by SPIFFE ID, parent and selectors.
func Key(id, parentID spiffeid.ID, selectors []entry.Selector) string {
	texts := make([]string, 0, len(selectors)+2)
	for _, sel := range selectors {
		texts = append(texts, sel.String())
	}
	slices.Sort(texts)
	return strings.Join(append(texts, id.String(), parentID.String()), "\x00")
}

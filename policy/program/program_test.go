// What programs answer by themselves; that they answer as OPA does is tested in
// policy/engine, which makes them.

package program

import (
	"strings"
	"testing"
	"time"

	"merlon.dev/policy"
)

var instant = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func get(path string) *policy.Input {
	return &policy.Input{Source: "spiffe://a.test/web", Destination: "spiffe://a.test/orders", Protocol: policy.HTTP, Method: "GET", Path: path}
}

func made(t testing.TB, src Source) *Program {
	t.Helper()
	if src.Destination == "" {
		src.Destination = "spiffe://a.test/orders"
	}
	p, err := New(src)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestZeroDenies(t *testing.T) {
	var p Program
	if v := p.Decide(&policy.Input{Source: "spiffe://a.test/web"}, instant); v.Allow() || v.Reason != policy.Error {
		t.Errorf("the zero program says %+v", v)
	}
	var v Verdict
	if v.Allow() {
		t.Error("the zero verdict allows")
	}
	everything := made(t, Source{Grants: []Grant{{ID: "all", Kind: Allow, Protocol: policy.HTTP}}, Allow: &Expr{Op: True}})
	for name, in := range map[string]*policy.Input{
		"no call": nil, "another destination": {Source: "spiffe://a.test/web", Destination: "spiffe://a.test/other", Protocol: policy.HTTP, Path: "/"},
	} {
		if v := everything.Decide(in, instant); v.Allow() || v.Reason != policy.Error {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

func TestOrderOfReasons(t *testing.T) {
	p := made(t, Source{
		NotAfter: instant.Add(time.Hour),
		Grants: []Grant{
			{ID: "a", Kind: Allow, Protocol: policy.HTTP, From: []string{"spiffe://a.test"}, Paths: []Path{{Text: "/a", More: true}}, Methods: []string{"GET"}},
			{ID: "b", Kind: Deny, Protocol: policy.HTTP, Paths: []Path{{Text: "/a/denied"}}},
			{ID: "c", Kind: DryRun, Protocol: policy.HTTP, From: []string{"spiffe://a.test", "spiffe://a.test/web", "spiffe://a.test/web"}},
			{ID: "d", Kind: Allow, Protocol: policy.HTTP, Paths: []Path{{Text: "/short"}}, Expires: instant.Add(time.Minute).UnixNano()},
		},
		Deny:  &Expr{Op: Equal, A: Operand{Field: Header, Text: "x-debug"}, B: Operand{Text: "on"}},
		Allow: &Expr{Op: Prefix, A: Operand{Field: URL}, B: Operand{Text: "/public"}},
	})
	tests := map[string]struct {
		change func(in *policy.Input)
		later  time.Duration
		reason policy.Reason
		rule   string
	}{
		"allowed":                {func(*policy.Input) {}, 0, policy.Allowed, "a"},
		"denied by a grant":      {func(in *policy.Input) { in.Path = "/a/denied" }, 0, policy.DenyRule, "b"},
		"denied by Rego":         {func(in *policy.Input) { in.Headers = policy.HeaderMap{"x-debug": {"on"}} }, 0, policy.DenyRule, "rego:deny"},
		"allowed by Rego":        {func(in *policy.Input) { in.Path = "/public/x" }, 0, policy.Allowed, "rego:allow"},
		"another method":         {func(in *policy.Input) { in.Method = "POST" }, 0, policy.MethodNotGranted, ""},
		"another path":           {func(in *policy.Input) { in.Path = "/b" }, 0, policy.PathNotGranted, ""},
		"exactly the prefix":     {func(in *policy.Input) { in.Path = "/a/" }, 0, policy.PathNotGranted, ""},
		"another protocol":       {func(in *policy.Input) { in.Protocol = policy.TCP; in.Path = "" }, 0, policy.NoGrant, ""},
		"no protocol":            {func(in *policy.Input) { in.Protocol = "" }, 0, policy.NoGrant, ""},
		"no identity":            {func(in *policy.Input) { in.Source = "" }, 0, policy.NoIdentity, ""},
		"ambiguous path":         {func(in *policy.Input) { in.Path = "/a/%2e" }, 0, policy.BadRequest, ""},
		"a grant before its end": {func(in *policy.Input) { in.Path = "/short" }, time.Minute - 1, policy.Allowed, "d"},
		"a grant at its end":     {func(in *policy.Input) { in.Path = "/short" }, time.Minute, policy.PathNotGranted, ""},
		"the policy's end":       {func(*policy.Input) {}, time.Hour + 1, policy.StalePolicy, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			in := get("/a/1")
			tt.change(in)
			v := p.Decide(in, instant.Add(tt.later))
			if v.Reason != tt.reason || v.RuleID != tt.rule || v.Allow() != (tt.reason == policy.Allowed) {
				t.Errorf("%+v; want %s %s", v, tt.reason, tt.rule)
			}
		})
	}
	if v := p.Decide(get("/a/1"), instant); strings.Join(v.DryRun, " ") != "c" {
		t.Errorf("dry-run matches: %q; want c once", v.DryRun)
	}
}

// More grants than are compared one by one, for one pair of services.
func TestManyGrantsOfOneCaller(t *testing.T) {
	var src Source
	for i := range 100 {
		id := string(rune('a'+i/10)) + string(rune('a'+i%10))
		g := Grant{ID: id, Kind: Allow, Protocol: policy.HTTP, Paths: []Path{{Text: "/" + id}, {Text: "/twice"}}, Methods: []string{"GET"}}
		if i%10 == 0 {
			g.Paths = []Path{{Text: "/" + id, More: true}}
		}
		src.Grants = append(src.Grants, g)
	}
	p := made(t, src)
	for path, want := range map[string]string{"/bc": "bc", "/ba/x": "ba", "/twice": "ab", "/jj": "jj"} {
		if v := p.Decide(get(path), instant); v.RuleID != want {
			t.Errorf("%s: %+v; want %s", path, v, want)
		}
	}
	in := get("/bc")
	in.Method = "PUT"
	if v := p.Decide(in, instant); v.Reason != policy.MethodNotGranted {
		t.Errorf("another method: %+v", v)
	}
	if v := p.Decide(get("/nowhere"), instant); v.Reason != policy.PathNotGranted {
		t.Errorf("another path: %+v", v)
	}
}

// A caller may stand under more patterns than there is room for.
func TestManyPatternsOfOneCaller(t *testing.T) {
	segments := strings.Split("spiffe://a.test/1/2/3/4/5/6/7/8/9/10/11/12", "/")
	var src Source
	for n := 3; n < len(segments); n++ {
		src.Grants = append(src.Grants, Grant{
			ID: string(rune('a' + n)), Kind: Allow, Protocol: policy.HTTP, From: []string{strings.Join(segments[:n], "/") + "/*"},
			Paths: []Path{{Text: "/" + string(rune('a'+n))}},
		})
	}
	p := made(t, src)
	for _, g := range src.Grants {
		in := get("/" + g.ID)
		in.Source = strings.Join(segments, "/")
		if v := p.Decide(in, instant); v.RuleID != g.ID {
			t.Errorf("%s: %+v", g.ID, v)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	element := Operand{Field: Element, N: 0}
	deep := Expr{Op: True}
	for range maxDepth + 2 {
		deep = Expr{Op: Not, Of: []Expr{deep}}
	}
	nested := Expr{Op: True}
	for range maxNested + 1 {
		nested = Expr{Op: Some, List: List{Kind: Segments}, Of: []Expr{nested}}
	}
	grant := Grant{ID: "a", Kind: Allow, Protocol: policy.HTTP}
	other := grant
	other.Protocol = "udp"
	kind := grant
	kind.Kind = 9
	for name, src := range map[string]Source{
		"one grant twice":         {Grants: []Grant{grant, grant}},
		"a protocol":              {Grants: []Grant{other}},
		"a kind":                  {Grants: []Grant{kind}},
		"an operation":            {Allow: &Expr{Op: ops}},
		"a field":                 {Allow: &Expr{Op: Defined, A: Operand{Field: fields}}},
		"a case":                  {Allow: &Expr{Op: Defined, A: Operand{Case: cases}}},
		"a list":                  {Allow: &Expr{Op: Listed, List: List{Kind: lists}}},
		"not of nothing":          {Allow: &Expr{Op: Not}},
		"a switch without cases":  {Allow: &Expr{Op: Switch, Set: []string{"a"}}},
		"an element of no list":   {Allow: &Expr{Op: Defined, A: element}},
		"an element too far in":   {Allow: &Expr{Op: Some, List: List{Kind: Segments}, Of: []Expr{{Op: Defined, A: Operand{Field: Element, N: 1}}}}},
		"a place of no list":      {Deny: &Expr{Op: Defined, A: Operand{Field: ListAt}}},
		"a split of nothing":      {Deny: &Expr{Op: Listed, List: List{Kind: Split, Key: "/"}}},
		"a split at nothing":      {Deny: &Expr{Op: Listed, List: List{Kind: Split, Of: &Operand{Field: URL}}}},
		"a bad pattern":           {Deny: &Expr{Op: Matches, A: Operand{Field: URL}, Pattern: "("}},
		"depth":                   {Deny: &deep},
		"lists within each other": {Deny: &nested},
	} {
		if p, err := New(src); err == nil {
			t.Errorf("%s was taken: %+v", name, p)
		}
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	p := made(t, Source{
		Grants: []Grant{
			{ID: "a", Kind: Allow, Protocol: policy.HTTP, From: []string{"spiffe://a.test/ns/*", "spiffe://b.test"}, Paths: []Path{{Parts: []Part{{Text: "a"}, {Free: true}}}}},
			{ID: "b", Kind: Deny, Protocol: policy.HTTP, Paths: []Path{{Text: "/no", More: true}}},
		},
		Deny: &Expr{Op: Some, List: List{Kind: Segments}, Of: []Expr{{Op: Equal, A: Operand{Field: Element}, B: Operand{Text: "evil"}}}},
		Allow: &Expr{Op: And, Of: []Expr{
			{Op: In, A: Operand{Field: Header, Text: "role"}, Set: []string{"admin", "user"}},
			{Op: Not, Of: []Expr{{Op: Equal, A: Operand{Field: SourceTrust}, B: Operand{Text: "b.test"}}}},
			{Op: Defined, A: Operand{Field: ListAt, N: 1, List: &List{Kind: Split, Key: "/", Of: &Operand{Field: URL}}}},
		}},
	})
	in := get("/x/y")
	in.Headers = policy.HeaderMap{"role": {"admin"}}
	if v := p.Decide(in, instant); v.RuleID != "rego:allow" {
		t.Fatalf("%+v", v)
	}
	if n := testing.AllocsPerRun(100, func() { p.Decide(in, instant) }); n != 0 {
		t.Errorf("a decision allocates %v times", n)
	}
}

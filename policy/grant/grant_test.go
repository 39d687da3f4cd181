// Which grants are well formed, and what they mean.

package grant

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"merlon.dev/policy"
	"merlon.dev/policy/strictyaml"
)

const sample = `grants:
  - id: web-reads-orders
    from: [spiffe://shop.test/web]
    to: [spiffe://shop.test/orders]
    http: {methods: [GET], paths: [/orders, /orders/*, "/orders/{id}/lines"]}
    owner: team-shop
    expires: 2027-01-01T00:00:00Z
  - id: batch
    from: [spiffe://shop.test/ns/batch/*, spiffe://other.test]
    grpc: {services: [shop.Orders], methods: [Get, List]}
    effect: deny
  - id: db
    to: [spiffe://shop.test/db]
    tcp: {}
    mode: dry-run
`

func parse(t testing.TB, yaml string) []Grant {
	t.Helper()
	g, err := Parse([]File{{Name: "grants.yaml", Data: []byte(yaml)}})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

var ignorePlaces = cmp.Options{cmpopts.IgnoreTypes(strictyaml.Position{}), cmpopts.IgnoreFields(Grant{}, "File")}

func TestParseReadsTheFormat(t *testing.T) {
	expires := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	want := []Grant{
		{ID: "batch", From: []string{"spiffe://shop.test/ns/batch/*", "spiffe://other.test"}, GRPC: &GRPC{Services: []string{"shop.Orders"}, Methods: []string{"Get", "List"}}, Effect: Deny},
		{ID: "db", To: []string{"spiffe://shop.test/db"}, TCP: &TCP{}, Mode: DryRun},
		{
			ID: "web-reads-orders", From: []string{"spiffe://shop.test/web"}, To: []string{"spiffe://shop.test/orders"},
			HTTP: &HTTP{Methods: []string{"GET"}, Paths: []string{"/orders", "/orders/*", "/orders/{id}/lines"}}, Owner: "team-shop", Expires: &expires,
		},
	}
	if diff := cmp.Diff(want, parse(t, sample), ignorePlaces); diff != "" {
		t.Error(diff)
	}
}

func TestGrantsSurviveTheirTripThroughData(t *testing.T) {
	want := parse(t, sample)
	data := Compile(want)
	raw, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	var back map[string]any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	if err := dec.Decode(&back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(data, back); diff != "" {
		t.Errorf("Compile gives other types than encoding/json:\n%s", diff)
	}
	written, err := Data(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := FromData(written)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, ignorePlaces); diff != "" {
		t.Error(diff)
	}
	if err := CheckData(written, got); err != nil {
		t.Error(err)
	}
}

// What decides must be what is written: an index with a grant more, or one
// changed, is not accepted.
func TestDataWhoseIndexSaysMoreThanItsGrantsIsRefused(t *testing.T) {
	doc := Compile(parse(t, sample))
	leaf := doc["index"].(map[string]any)["spiffe://shop.test/orders"].(map[string]any)["spiffe://shop.test/web"].(map[string]any)["http"].(map[string]any)
	leaf["allow"].([]any)[0].(map[string]any)["any"] = true
	data, err := json.Marshal(map[string]any{"merlon": doc})
	if err != nil {
		t.Fatal(err)
	}
	grants, err := FromData(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckData(data, grants); err == nil || !strings.Contains(err.Error(), "was not made from its grants") {
		t.Errorf("CheckData = %v", err)
	}
}

func TestFromDataRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ data, want string }{
		"nothing":               {``, "an object is missing"},
		"an array":              {`[]`, "an object is missing"},
		"no grants":             {`{"merlon":{"index":{},"depths":{}}}`, "has no grants"},
		"another document":      {`{"merlon":{"grants":{}},"more":1}`, `"more" beside "merlon"`},
		"an unknown part":       {`{"merlon":{"grants":{},"grant":{}}}`, `unknown key "grant"`},
		"grants twice":          {`{"merlon":{"grants":{},"grants":{}}}`, `"grants" is in it twice`},
		"a grant twice":         {`{"merlon":{"grants":{"a":{"tcp":{}},"a":{"tcp":{}}}}}`, `"a" is in it twice`},
		"an unknown field":      {`{"merlon":{"grants":{"a":{"tcp":{},"form":[]}}}}`, `grant "a": json: unknown field "form"`},
		"a grant that is wrong": {`{"merlon":{"grants":{"a":{}}}}`, `http, grpc and tcp`},
		"cut off":               {`{"merlon":{"grants":{"a":{"tcp":{}}`, "EOF"},
		"more behind it":        {`{"merlon":{"grants":{}}}{}`, "more than one JSON value"},
	} {
		if got, err := FromData([]byte(tt.data)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v; want %q", name, got, err, tt.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const (
		from = "from: [spiffe://a.test/x]"
		rest = from + ", to: [spiffe://a.test/y]"
	)
	one := func(fields string) string { return "grants:\n  - {" + fields + "}\n" }
	tests := map[string]struct{ yaml, want string }{
		"no grants key":         {"", `has no top-level key "grants"`},
		"other top-level key":   {"grant: []", `unknown key "grant" (did you mean "grants"?)`},
		"typo in key":           {"grants:\n  - id: a\n    form: [spiffe://a.test]\n    tcp: {}", `grants.yaml:3:5: grants[0]: unknown key "form" (did you mean "from"?)`},
		"typo in method key":    {one("id: a, http: {method: [GET]}"), `unknown key "method" (did you mean "methods"?)`},
		"no id":                 {one("tcp: {}"), `grants.yaml:2:6: grant.id: is missing`},
		"id of rego":            {one("id: 'rego:allow', tcp: {}"), `begins with "rego:"`},
		"duplicate id":          {"grants:\n  - {id: a, tcp: {}}\n  - {id: a, tcp: {}}", `grants.yaml:3:6: grant "a".id: is taken by the grant at grants.yaml:2`},
		"empty from":            {one("id: a, from: [], tcp: {}"), `grant "a".from: is empty; leave from out to mean any`},
		"empty to":              {one("id: a, to: [], tcp: {}"), `grant "a".to: is empty`},
		"null from":             {"grants:\n  - id: a\n    from:\n    tcp: {}", `has no value`},
		"empty methods":         {one("id: a, http: {methods: []}"), `grant "a".http.methods: is empty`},
		"empty paths":           {one("id: a, http: {paths: []}"), `http.paths: is empty`},
		"empty services":        {one("id: a, grpc: {services: []}"), `grpc.services: is empty`},
		"empty rpcs":            {one("id: a, grpc: {methods: []}"), `grpc.methods: is empty`},
		"no protocol":           {one("id: a, " + rest), `needs exactly one of http, grpc and tcp, has 0`},
		"two protocols":         {one("id: a, http: {}, tcp: {}"), `exactly one of http, grpc and tcp, has 2`},
		"effect":                {one("id: a, tcp: {}, effect: dney"), `"dney" is neither allow nor deny (did you mean "deny"?)`},
		"empty effect":          {one("id: a, tcp: {}, effect: ''"), `"" is neither allow nor deny`},
		"mode":                  {one("id: a, tcp: {}, mode: dryrun"), `did you mean "dry-run"?`},
		"expires":               {one("id: a, tcp: {}, expires: 2027-01-01"), `is not a time such as`},
		"tcp with fields":       {one("id: a, tcp: {ports: [1]}"), `unknown key "ports"`},
		"ID1 scheme":            {one("id: a, from: ['https://a.test/x'], tcp: {}"), `from[0]: "https://a.test/x" is not a SPIFFE ID`},
		"ID1 no scheme":         {one("id: a, from: [a.test/x], tcp: {}"), `(did you mean "spiffe://a.test/x"?)`},
		"ID1 no trust domain":   {one("id: a, from: ['spiffe:///x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID1 query":             {one("id: a, from: ['spiffe://a.test/x?y'], tcp: {}"), `is not a SPIFFE ID`},
		"ID1 fragment":          {one("id: a, from: ['spiffe://a.test/x#'], tcp: {}"), `is not a SPIFFE ID`},
		"ID2 port":              {one("id: a, from: ['spiffe://a.test:80/x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID2 user":              {one("id: a, from: ['spiffe://u@a.test/x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID3 upper case":        {one("id: a, from: ['spiffe://A.test/x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID3 percent":           {one("id: a, to: ['spiffe://%61.test/x'], tcp: {}"), `to[0]: "spiffe://%61.test/x" is not a SPIFFE ID`},
		"ID5 empty segment":     {one("id: a, from: ['spiffe://a.test//x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID5 trailing slash":    {one("id: a, from: ['spiffe://a.test/x/'], tcp: {}"), `is not a SPIFFE ID`},
		"ID5 dots":              {one("id: a, from: ['spiffe://a.test/../x'], tcp: {}"), `is not a SPIFFE ID`},
		"ID6 long":              {one("id: a, from: ['spiffe://a.test/" + strings.Repeat("x", 2048) + "'], tcp: {}"), `longer than 2048 bytes`},
		"ID7 long trust domain": {one("id: a, from: ['spiffe://" + strings.Repeat("x", 256) + "/x'], tcp: {}"), `trust domain longer than 255 bytes`},
		"star in segment":       {one("id: a, from: ['spiffe://a.test/x*'], tcp: {}"), `"*" elsewhere than as the whole last segment`},
		"star in the middle":    {one("id: a, from: ['spiffe://a.test/*/x'], tcp: {}"), `"*" elsewhere`},
		"star for all":          {one("id: a, from: ['*'], tcp: {}"), `"*" elsewhere`},
		"twice":                 {one("id: a, from: [spiffe://a.test, spiffe://a.test], tcp: {}"), `stands in the list twice`},
		"path without slash":    {one("id: a, http: {paths: [orders]}"), `(did you mean "/orders"?)`},
		"path star":             {one("id: a, http: {paths: ['*']}"), `(did you mean "/*"?)`},
		"path star in middle":   {one("id: a, http: {paths: ['/a/*/b']}"), `"*" elsewhere`},
		"path star in segment":  {one("id: a, http: {paths: ['/a*']}"), `"*" elsewhere`},
		"path half template":    {one("id: a, http: {paths: ['/a/{id']}"), `not a whole segment such as {id}`},
		"path glued template":   {one("id: a, http: {paths: ['/a/x{id}']}"), `not a whole segment`},
		"path nameless":         {one("id: a, http: {paths: ['/a/{}']}"), `not a whole segment`},
		"ambiguous path":        {one("id: a, http: {paths: ['/a/../b']}"), `could only match paths that are refused`},
		"encoded path":          {one("id: a, http: {paths: ['/%61']}"), `could only match paths that are refused`},
		"query in path":         {one("id: a, http: {paths: ['/a?b=c']}"), `could only match paths that are refused`},
		"empty segment":         {one("id: a, http: {paths: ['/a//*']}"), `empty segment`},
		"bad method":            {one("id: a, http: {methods: ['GET POST']}"), `is not an HTTP method`},
		"any method":            {one("id: a, http: {methods: ['*']}"), `leave methods out to mean any`},
		"bad service":           {one("id: a, grpc: {services: [/shop.Orders]}"), `is not the full name of a gRPC service`},
		"bad rpc":               {one("id: a, grpc: {methods: [shop.Orders/Get]}"), `is not the name of a gRPC method`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]File{{Name: "grants.yaml", Data: []byte(tt.yaml)}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "grants.yaml:") {
				t.Errorf("error %v\ndoes not contain %q", err, tt.want)
			}
		})
	}
}

func TestIDsAreUniqueOverAllFiles(t *testing.T) {
	f := []byte("grants:\n  - {id: a, tcp: {}}\n")
	_, err := Parse([]File{{Name: "a.yaml", Data: f}, {Name: "b.yaml", Data: f}})
	if err == nil || err.Error() != `b.yaml:2:6: grant "a".id: is taken by the grant at a.yaml:2; IDs are unique over all files` {
		t.Error(err)
	}
}

// T48: patterns go by whole segments.
func TestT48SPIFFEIDPatternsGoByWholeSegments(t *testing.T) {
	tests := map[string]struct{ yes, no []string }{
		"spiffe://td/ns/a":   {[]string{"spiffe://td/ns/a"}, []string{"spiffe://td/ns/a-evil", "spiffe://td/ns/a/b", "spiffe://td/ns", "spiffe://tdx/ns/a", "spiffe://td/ns/A"}},
		"spiffe://td/ns/a/*": {[]string{"spiffe://td/ns/a/b", "spiffe://td/ns/a/b/c"}, []string{"spiffe://td/ns/a", "spiffe://td/ns/a-evil/b", "spiffe://td/ns/a-evil", "spiffe://td2/ns/a/b"}},
		"spiffe://td":        {[]string{"spiffe://td/x", "spiffe://td/x/y"}, []string{"spiffe://td.evil/x", "spiffe://tdx/x", "spiffe://t/d"}},
		"spiffe://a.b/x":     {[]string{"spiffe://a.b/x"}, []string{"spiffe://aXb/x", "spiffe://a.b/xx"}},
	}
	for pattern, tt := range tests {
		for _, id := range tt.yes {
			if !MatchSPIFFEID(pattern, id) {
				t.Errorf("%s does not match %s", pattern, id)
			}
		}
		for _, id := range tt.no {
			if MatchSPIFFEID(pattern, id) {
				t.Errorf("%s matches %s", pattern, id)
			}
		}
	}
}

func TestMatchPath(t *testing.T) {
	tests := map[string]struct{ yes, no []string }{
		"/orders":            {[]string{"/orders"}, []string{"/orders/", "/orders/1", "/order", "/Orders"}},
		"/":                  {[]string{"/"}, []string{"/a"}},
		"/*":                 {[]string{"/a", "/a/b"}, []string{"/"}},
		"/orders/*":          {[]string{"/orders/1", "/orders/1/2"}, []string{"/orders", "/orders/", "/orders-evil/1"}},
		"/orders/{id}":       {[]string{"/orders/1"}, []string{"/orders", "/orders/", "/orders/1/2", "/orders/1/"}},
		"/orders/{id}/lines": {[]string{"/orders/1/lines"}, []string{"/orders//lines", "/orders/1/linesX", "/orders/1/2/lines"}},
		"/{a}/{b}":           {[]string{"/x/y"}, []string{"/x", "/x/", "/x/y/z"}},
		"/v/x:delete":        {[]string{"/v/x:delete", "/v/x%3Adelete", "/v/x%3adelete"}, []string{"/v/x", "/v/x%2Bdelete"}},
		"/v/x%3Adelete":      {[]string{"/v/x:delete", "/v/x%3adelete"}, []string{"/v/x"}},
		"/caf%C3%A9/*":       {[]string{"/café/x", "/caf%c3%a9/x"}, []string{"/café", "/cafe/x"}},
		"/{id}/café":         {[]string{"/1/caf%C3%A9"}, []string{"/1/cafe"}},
		"/%7Bid%7D":          {[]string{"/{id}", "/%7bid%7d"}, []string{"/x"}},
		"/a+b":               {[]string{"/a+b", "/a%2Bb"}, []string{"/a b", "/a%20b"}},
		"/u/{id}/*":          {[]string{"/u/1/x", "/u/1/x/y"}, []string{"/u/1", "/u/1/", "/v/1/x"}},
	}
	for pattern, tt := range tests {
		for _, p := range tt.yes {
			if !MatchPath(pattern, p) {
				t.Errorf("%s does not match %s", pattern, p)
			}
		}
		for _, p := range tt.no {
			if MatchPath(pattern, p) {
				t.Errorf("%s matches %s", pattern, p)
			}
		}
	}
}

func TestDecideNamesTheNearestMiss(t *testing.T) {
	grants := parse(t, `grants:
  - {id: reads, from: [spiffe://s.test/web], to: [spiffe://s.test/orders], http: {methods: [GET], paths: [/orders]}}
  - {id: old, from: [spiffe://s.test/old], to: [spiffe://s.test/orders], http: {}, expires: 2020-01-01T00:00:00Z}
  - {id: no-admin, http: {paths: [/orders/admin, /admin/*]}, effect: deny}
  - {id: all-of-ops, from: [spiffe://s.test/ops], http: {}}
  - {id: tried, from: [spiffe://s.test/web], http: {}, mode: dry-run}
  - {id: calls, from: [spiffe://s.test/web], grpc: {services: [shop.Orders], methods: [Get]}}
`)
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	tests := map[string]struct {
		source, method, path string
		protocol             policy.Protocol
		reason               policy.Reason
		grant                string
	}{
		"allowed":         {"web", "GET", "/orders", policy.HTTP, policy.Allowed, "reads"},
		"other method":    {"web", "POST", "/orders", policy.HTTP, policy.MethodNotGranted, ""},
		"other path":      {"web", "GET", "/x", policy.HTTP, policy.PathNotGranted, ""},
		"both":            {"web", "POST", "/x", policy.HTTP, policy.PathNotGranted, ""},
		"other source":    {"cart", "GET", "/orders", policy.HTTP, policy.NoGrant, ""},
		"expired":         {"old", "GET", "/orders", policy.HTTP, policy.NoGrant, ""},
		"deny wins":       {"ops", "GET", "/admin/x", policy.HTTP, policy.DenyRule, "no-admin"},
		"other protocol":  {"web", "GET", "", policy.TCP, policy.NoGrant, ""},
		"grpc":            {"web", "POST", "/shop.Orders/Get", policy.GRPC, policy.Allowed, "calls"},
		"grpc method":     {"web", "POST", "/shop.Orders/Delete", policy.GRPC, policy.MethodNotGranted, ""},
		"grpc service":    {"web", "POST", "/shop.Carts/Get", policy.GRPC, policy.PathNotGranted, ""},
		"grpc malformed":  {"web", "POST", "/shop.Orders/Get/x", policy.GRPC, policy.PathNotGranted, ""},
		"http is no grpc": {"ops", "POST", "/shop.Orders/Get", policy.GRPC, policy.NoGrant, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out := Decide(grants, &policy.Input{Source: "spiffe://s.test/" + tt.source, Destination: "spiffe://s.test/orders", Protocol: tt.protocol, Method: tt.method, Path: tt.path}, now)
			if out.Reason != tt.reason || out.GrantID != tt.grant || out.Allow != (tt.reason == policy.Allowed) {
				t.Errorf("Decide = %+v; want %s %q", out, tt.reason, tt.grant)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("grants: []"))
	f.Add([]byte("grants: [{id: a, http: {paths: ['/{x}/*']}}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		grants, err := Parse([]File{{Name: "f.yaml", Data: data}})
		if err != nil {
			return
		}
		written, err := Data(grants)
		if err != nil {
			t.Fatal(err)
		}
		back, err := FromData(written)
		if err == nil {
			err = CheckData(written, back)
		}
		if err != nil {
			t.Errorf("accepted grants do not survive compilation: %v", err)
		}
	})
}

func FuzzFromData(f *testing.F) {
	grants, err := Parse([]File{{Name: "f.yaml", Data: []byte(sample)}})
	if err != nil {
		f.Fatal(err)
	}
	data, err := Data(grants)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"merlon":{"grants":{"a":{"tcp":{}}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		grants, err := FromData(data)
		if err != nil {
			return
		}
		again, err := Data(grants)
		if err != nil {
			t.Fatal(err)
		}
		back, err := FromData(again)
		if err != nil || CheckData(again, back) != nil {
			t.Errorf("what was read does not survive writing: %v", err)
		}
	})
}

func TestIsSingle(t *testing.T) {
	for pattern, want := range map[string]bool{
		"spiffe://a.test/web": true, "spiffe://a.test/ns/x": true, "spiffe://a.test": false, "spiffe://a.test/*": false, "spiffe://a.test/ns/*": false,
	} {
		if got := IsSingle(pattern); got != want {
			t.Errorf("IsSingle(%s) = %v", pattern, got)
		}
	}
}

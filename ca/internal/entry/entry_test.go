// What an entry may say, and that what it says survives the store.

package entry

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/role"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("shop.test")
	now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
)

func valid() *Entry {
	return &Entry{
		SPIFFEID:  spiffeid.RequireFromString("spiffe://shop.test/web"),
		ParentID:  spiffeid.RequireFromString("spiffe://shop.test/agent/n1"),
		Selectors: []Selector{{"unix", "uid:1000"}},
	}
}

func TestAcceptsGoodEntries(t *testing.T) {
	for name, change := range map[string]func(*Entry){
		"least":     func(*Entry) {},
		"every ttl": func(e *Entry) { e.X509SVIDTTL, e.JWTSVIDTTL = MaxX509SVIDTTL, MinTTL },
		"dns names": func(e *Entry) { e.DNSNames = []string{"web", "web.shop.test", "xn--bcher-kva.test", "1.test2"} },
		"cn, hint":  func(e *Entry) { e.CommonName, e.Hint = "Web Dienst ä", strings.Repeat("h", 1024) },
		"selectors": func(e *Entry) {
			e.Selectors = []Selector{
				{"unix", "gid:0"},
				{"unix", "path:/usr/bin/a:b"},
				{"unix", "sha256:" + strings.Repeat("a0", 32)},
				{"unix", "user:www-data"},
				{"unix", "group:adm"},
				{"unix", "supplementary_gid:4"},
				{"unix", "supplementary_group:docker"},
				{"systemd", "unit:web@blue.service"},
				{"container", "id:" + strings.Repeat("a0", 32)},
				{"container", "runtime:cri-o"},
				{"k8s", "pod-uid:0195b7a2-5c1e-7c55-8d0e-0123456789ab"},
				{"k8s", "qos:besteffort"},
			}
		},
		"federation": func(e *Entry) { e.FederatesWith = []string{"partner.test", "10.0.0.1", "a..b"} },
		"expiry":     func(e *Entry) { e.ExpiresAt = now.Add(time.Second) },
		"agent-like": func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://shop.test/agents/x") },
		"below ca":   func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://shop.test/ca/web") },
		"longest ID": func(e *Entry) {
			id := "spiffe://shop.test/" + strings.Repeat("a", 2048-len("spiffe://shop.test/"))
			e.SPIFFEID = spiffeid.RequireFromString(id)
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := valid()
			change(e)
			if err := e.Validate(td, now); err != nil {
				t.Fatalf("Validate() = %v; want no error", err)
			}
		})
	}
}

func TestRefusesBadEntriesNamingTheField(t *testing.T) {
	id := spiffeid.RequireFromString
	for name, test := range map[string]struct {
		change func(*Entry)
		field  string
	}{
		"no ID":             {func(e *Entry) { e.SPIFFEID = spiffeid.ID{} }, "spiffe_id"},
		"root path":         {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test") }, "spiffe_id"},
		"other domain":      {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test2/web") }, "spiffe_id"},
		"agent ID":          {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test/agent/n1") }, "spiffe_id"},
		"agent root":        {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test/agent") }, "spiffe_id"},
		"below an agent":    {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test/agent/n1/x") }, "spiffe_id"},
		"CA ID":             {func(e *Entry) { e.SPIFFEID = id("spiffe://shop.test/ca") }, "spiffe_id"},
		"no parent":         {func(e *Entry) { e.ParentID = spiffeid.ID{} }, "parent_id"},
		"workload parent":   {func(e *Entry) { e.ParentID = id("spiffe://shop.test/web") }, "parent_id"},
		"nested parent":     {func(e *Entry) { e.ParentID = id("spiffe://shop.test/agent/n1/x") }, "parent_id"},
		"foreign parent":    {func(e *Entry) { e.ParentID = id("spiffe://other.test/agent/n1") }, "parent_id"},
		"no selectors":      {func(e *Entry) { e.Selectors = nil }, "selectors"},
		"twice":             {func(e *Entry) { e.Selectors = append(e.Selectors, e.Selectors[0]) }, "selectors"},
		"many selectors":    {func(e *Entry) { e.Selectors = make([]Selector, 65) }, "selectors"},
		"typo in type":      {func(e *Entry) { e.Selectors = []Selector{{"unxi", "uid:1"}} }, "selectors"},
		"typo in key":       {func(e *Entry) { e.Selectors = []Selector{{"unix", "uidd:1"}} }, "selectors"},
		"no key":            {func(e *Entry) { e.Selectors = []Selector{{"unix", "1000"}} }, "selectors"},
		"leading zero":      {func(e *Entry) { e.Selectors = []Selector{{"unix", "uid:01000"}} }, "selectors"},
		"no such uid":       {func(e *Entry) { e.Selectors = []Selector{{"unix", "uid:4294967295"}} }, "selectors"},
		"relative path":     {func(e *Entry) { e.Selectors = []Selector{{"unix", "path:bin/web"}} }, "selectors"},
		"unclean path":      {func(e *Entry) { e.Selectors = []Selector{{"unix", "path:/bin/../web"}} }, "selectors"},
		"newline in path":   {func(e *Entry) { e.Selectors = []Selector{{"unix", "path:/bin/a\nb"}} }, "selectors"},
		"short sha256":      {func(e *Entry) { e.Selectors = []Selector{{"unix", "sha256:abcd"}} }, "selectors"},
		"user with a colon": {func(e *Entry) { e.Selectors = []Selector{{"unix", "user:a:b"}} }, "selectors"},
		"empty group":       {func(e *Entry) { e.Selectors = []Selector{{"unix", "group:"}} }, "selectors"},
		"unit, no suffix":   {func(e *Entry) { e.Selectors = []Selector{{"systemd", "unit:nginx"}} }, "selectors"},
		"unit in a slice":   {func(e *Entry) { e.Selectors = []Selector{{"systemd", "unit:system.slice/nginx.service"}} }, "selectors"},
		"short container":   {func(e *Entry) { e.Selectors = []Selector{{"container", "id:0123456789ab"}} }, "selectors"},
		"unknown runtime":   {func(e *Entry) { e.Selectors = []Selector{{"container", "runtime:lxc"}} }, "selectors"},
		"pod by name":       {func(e *Entry) { e.Selectors = []Selector{{"k8s", "pod-uid:web-0"}} }, "selectors"},
		"QoS in capitals":   {func(e *Entry) { e.Selectors = []Selector{{"k8s", "qos:Burstable"}} }, "selectors"},
		"upper-case sha256": {func(e *Entry) { e.Selectors = []Selector{{"unix", "sha256:" + strings.Repeat("AB", 32)}} }, "selectors"},
		"long TTL":          {func(e *Entry) { e.X509SVIDTTL = MaxX509SVIDTTL + 1 }, "x509_svid_ttl_seconds"},
		"huge TTL":          {func(e *Entry) { e.X509SVIDTTL = math.MaxInt64 }, "x509_svid_ttl_seconds"},
		"negative TTL":      {func(e *Entry) { e.X509SVIDTTL = -time.Hour }, "x509_svid_ttl_seconds"},
		"short TTL":         {func(e *Entry) { e.X509SVIDTTL = MinTTL - 1 }, "x509_svid_ttl_seconds"},
		"long JWT TTL":      {func(e *Entry) { e.JWTSVIDTTL = MaxJWTSVIDTTL + 1 }, "jwt_svid_ttl_seconds"},
		"wildcard":          {func(e *Entry) { e.DNSNames = []string{"*.shop.test"} }, "dns_names"},
		"upper-case name":   {func(e *Entry) { e.DNSNames = []string{"Web.shop.test"} }, "dns_names"},
		"IP as name":        {func(e *Entry) { e.DNSNames = []string{"10.0.0.1"} }, "dns_names"},
		"empty label":       {func(e *Entry) { e.DNSNames = []string{"web..test"} }, "dns_names"},
		"trailing dot":      {func(e *Entry) { e.DNSNames = []string{"web.test."} }, "dns_names"},
		"name twice":        {func(e *Entry) { e.DNSNames = []string{"web.test", "web.test"} }, "dns_names"},
		"NUL in name":       {func(e *Entry) { e.DNSNames = []string{"web\x00.test"} }, "dns_names"},
		"long CN":           {func(e *Entry) { e.CommonName = strings.Repeat("c", 65) }, "common_name"},
		"space around CN":   {func(e *Entry) { e.CommonName = "web " }, "common_name"},
		"newline in CN":     {func(e *Entry) { e.CommonName = "a\nb" }, "common_name"},
		"ANSI in hint":      {func(e *Entry) { e.Hint = "\x1b[31m" }, "hint"},
		"U+2028 in hint":    {func(e *Entry) { e.Hint = "a\u2028b" }, "hint"},
		"bad UTF-8 in hint": {func(e *Entry) { e.Hint = "\xff" }, "hint"},
		"long hint":         {func(e *Entry) { e.Hint = strings.Repeat("h", 1025) }, "hint"},
		"key delivery":      {func(e *Entry) { e.KeyDelivery = "nobody" }, "key_delivery"},
		"own federation":    {func(e *Entry) { e.FederatesWith = []string{"partner.test", "shop.test"} }, "federates_with"},
		"federation twice":  {func(e *Entry) { e.FederatesWith = []string{"a.test", "b.test", "a.test"} }, "federates_with"},
		"an ID for a name":  {func(e *Entry) { e.FederatesWith = []string{"spiffe://partner.test"} }, "federates_with"},
		"name in capitals":  {func(e *Entry) { e.FederatesWith = []string{"Partner.test"} }, "federates_with"},
		"empty federation":  {func(e *Entry) { e.FederatesWith = []string{""} }, "federates_with"},
		"long federation":   {func(e *Entry) { e.FederatesWith = []string{strings.Repeat("a", 256)} }, "federates_with"},
		"many federations": {func(e *Entry) {
			for i := range 65 {
				e.FederatesWith = append(e.FederatesWith, fmt.Sprintf("p%d.test", i))
			}
		}, "federates_with"},
		"expired":    {func(e *Entry) { e.ExpiresAt = now }, "expires_at"},
		"year 10000": {func(e *Entry) { e.ExpiresAt = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, "expires_at"},
	} {
		t.Run(name, func(t *testing.T) {
			e := valid()
			test.change(e)
			wantInvalid(t, e.Validate(td, now), test.field)
		})
	}
}

func wantInvalid(t *testing.T, err error, field string) {
	t.Helper()
	var invalid *InvalidError
	if !errors.As(err, &invalid) {
		t.Fatalf("error = %v; want an *InvalidError", err)
	}
	if invalid.Field != field || invalid.Reason == "" {
		t.Fatalf("error = %+v; want field %q and a reason", invalid, field)
	}
}

func TestSuggestsTheNearestSelector(t *testing.T) {
	for in, want := range map[string]string{
		"unxi:uid:1":     "did you mean unix?",
		"unix:pth:/a":    "did you mean path?",
		"kubernetes:x":   "known: container, k8s, systemd, unix",
		"unix:program:x": "known: gid, group, path, sha256, supplementary_gid, supplementary_group, uid, user",
		"uid":            "has no colon",
	} {
		if _, err := ParseSelector(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseSelector(%q) = %v; want %q in it", in, err, want)
		}
	}
}

// ID1-ID7 of SECURITY.md: refused, never normalised.
func TestRefusesMalformedSPIFFEIDs(t *testing.T) {
	for _, id := range []string{
		"", "spiffe://", "spiffe:///x", "https://td/x", "spiffe:/td/x", "//td/x", "td/x", "SPIFFE://td/x",
		"spiffe://td/x?a", "spiffe://td/x#a", "spiffe://td/x?", "spiffe://td/x#",
		"spiffe://u@td/x", "spiffe://td:80/x", "spiffe://td:/x", "spiffe://@td/x", "spiffe://u:p@td/x",
		"spiffe://TD/x", "spiffe://%61/x", "spiffe://tä/x", "spiffe://[::1]/x", "spiffe://t d/x", "spiffe://td\x00/x", "spiffe://td\n/x",
		"spiffe://td//a", "spiffe://td/a//b", "spiffe://td/a/", "spiffe://td/", "spiffe://td/.", "spiffe://td/a/../b", "spiffe://td/..",
		"spiffe://td/%2e%2e", "spiffe://td/%61", `spiffe://td/a\b`, "spiffe://td/a;b", "spiffe://td/a\x00", "spiffe://td/a\r\n", "spiffe://td/a\n",
		"spiffe://td/\u2024", "spiffe://td/a b", "spiffe://td/a:b", "spiffe://td/*", " spiffe://td/a", "spiffe://td/a ",
		"spiffe://td/" + strings.Repeat("a", 2048), "spiffe://" + strings.Repeat("a", 256) + "/a",
	} {
		_, err := ParseID("spiffe_id", id)
		wantInvalid(t, err, "spiffe_id")
	}
}

// ID4: names that look like addresses are names like others.
func TestAcceptsOddTrustDomains(t *testing.T) {
	for _, name := range []string{"10.0.0.1", "a..b", "-", "_", "localhost", strings.Repeat("a", 255)} {
		got, err := ParseTrustDomain("trust_domain", name)
		if err != nil || got.Name() != name {
			t.Errorf("ParseTrustDomain(%q) = %v, %v", name, got, err)
		}
		if _, err := ParseID("spiffe_id", "spiffe://"+name+"/web"); err != nil {
			t.Errorf("ParseID in %q = %v", name, err)
		}
	}
	for _, name := range []string{"", "spiffe://td", "td/x", "td:1", "TD", strings.Repeat("a", 256)} {
		_, err := ParseTrustDomain("trust_domain", name)
		wantInvalid(t, err, "trust_domain")
	}
}

func TestAgentNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "a b", "ä", strings.Repeat("a", 129), "%41", "a\n"} {
		if id, err := AgentID(td, name); err == nil {
			t.Errorf("AgentID(%q) = %s; want an error", name, id)
		}
	}
	id, err := AgentID(td, "Node-1._")
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := AgentName(id); !ok || got != "Node-1._" {
		t.Errorf("AgentName(%s) = %q, %v", id, got, ok)
	}
	if !Reserved(id) || !Reserved(CAID(td)) {
		t.Error("an agent's or the CA's ID is not reserved")
	}
}

func TestTTLNeverPassesTheEntrysEnd(t *testing.T) {
	e := valid()
	e.ExpiresAt = now.Add(time.Minute)
	if got := e.X509TTL(now, time.Hour); got != time.Minute {
		t.Errorf("X509TTL = %s; want 1m0s", got)
	}
	e.JWTSVIDTTL = 30 * time.Second
	if got := e.JWTTTL(now, time.Hour); got != 30*time.Second {
		t.Errorf("JWTTTL = %s; want 30s", got)
	}
	if !e.Expired(e.ExpiresAt) || e.Expired(now) {
		t.Error("Expired is wrong about the end")
	}
}

func TestTTLFromSecondsNeverOverflows(t *testing.T) {
	for _, s := range []int64{-1, math.MinInt64, math.MaxInt64, math.MaxInt64 / int64(time.Second), 86401} {
		_, err := TTLFromSeconds("x509_svid_ttl_seconds", s)
		wantInvalid(t, err, "x509_svid_ttl_seconds")
	}
	if d, err := TTLFromSeconds("x509_svid_ttl_seconds", 86400); err != nil || d != MaxX509SVIDTTL {
		t.Errorf("TTLFromSeconds(86400) = %s, %v", d, err)
	}
}

var someRoles = []role.Role{
	{}, {Name: role.Operator}, {Name: role.Viewer}, {Name: role.PolicyPublisher}, {Name: role.Registrar, Prefix: "/ns/shop"},
}

var genEntry = rapid.Custom(func(t *rapid.T) *Entry {
	segment := rapid.StringMatching(`[a-zA-Z0-9_-]{1,12}`)
	e := &Entry{
		ID:            NewID(),
		SPIFFEID:      spiffeid.RequireFromPath(td, "/w/"+segment.Draw(t, "id")),
		ParentID:      spiffeid.RequireFromPath(td, "/agent/"+segment.Draw(t, "agent")),
		X509SVIDTTL:   time.Duration(rapid.Int64Range(int64(MinTTL), int64(MaxX509SVIDTTL)).Draw(t, "ttl")),
		JWTSVIDTTL:    time.Duration(rapid.Int64Range(int64(MinTTL), int64(MaxJWTSVIDTTL)).Draw(t, "jwt ttl")),
		DNSNames:      rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z]{1,9}\.test`), 0, 3, rapid.ID[string]).Draw(t, "dns"),
		CommonName:    rapid.StringMatching(`([!-~ä][ -~ä]{0,30}[!-~ä])?`).Draw(t, "cn"),
		Hint:          rapid.StringMatching(`[ -~]{0,30}`).Draw(t, "hint"),
		KeyDelivery:   rapid.SampledFrom([]KeyDelivery{ByAgent, ByWorkload, ByEither}).Draw(t, "key delivery"),
		Role:          rapid.SampledFrom(someRoles).Draw(t, "role"),
		FederatesWith: rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z0-9._-]{1,9}\.test`), 0, 3, rapid.ID[string]).Draw(t, "federates with"),
		CreatedAt:     now.Add(time.Duration(rapid.Int64Range(0, 1e15).Draw(t, "created"))),
	}
	if rapid.Bool().Draw(t, "expires") {
		e.ExpiresAt = now.Add(time.Duration(rapid.Int64Range(1, 1e18).Draw(t, "expiry")))
	}
	for _, uid := range rapid.SliceOfNDistinct(rapid.Uint32Range(0, 1<<31), 1, 4, rapid.ID[uint32]).Draw(t, "uids") {
		e.Selectors = append(e.Selectors, Selector{"unix", fmt.Sprintf("uid:%d", uid)})
	}
	return e
})

func TestDecodeUndoesEncode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := genEntry.Draw(t, "entry")
		if err := e.Validate(td, now); err != nil {
			t.Fatalf("generated entry: %v", err)
		}
		b, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, got, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("Decode(Encode(e)) differs (-want +got):\n%s", diff)
		}
	})
}

// A Merlon that does not know the ways of a key must not hand one out.
func TestEntryThatKeepsAKeyIsOfANewerVersion(t *testing.T) {
	for delivery, want := range map[KeyDelivery]string{ByAgent: `{"v":1,`, ByWorkload: `{"v":2,`, ByEither: `{"v":2,`} {
		e := valid()
		e.KeyDelivery = delivery
		if b, err := Encode(e); err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("Encode() with %q = %s, %v; want %s", delivery, b, err, want)
		}
	}
}

func TestDecodeRefusesANewerVersion(t *testing.T) {
	b, err := Encode(valid())
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(b), `"v":1`, `"v":3`, 1)
	if _, err := Decode([]byte(newer)); err == nil {
		t.Fatal("Decode took a newer version")
	}
}

// The grammar of SPIFFE-ID §2, written down a second time.
var idGrammar = regexp.MustCompile(`^spiffe://[a-z0-9._-]{1,255}(/[a-zA-Z0-9._-]+)*$`)

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"spiffe://td/a", "spiffe://td", "spiffe://td/../a", "spiffe://td/a\n", "spiffe://10.0.0.1/a.b_c-d", "spiffe://td/...", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID("spiffe_id", s)
		want := len(s) <= 2048 && idGrammar.MatchString(s) && !strings.HasSuffix(s, "\n")
		// A trust domain may be made of dots, a path segment may not.
		_, path, _ := strings.Cut(strings.TrimPrefix(s, "spiffe://"), "/")
		for segment := range strings.SplitSeq(path, "/") {
			want = want && segment != "." && segment != ".."
		}
		if (err == nil) != want {
			t.Fatalf("ParseID(%q) = %v; the grammar says valid = %v", s, err, want)
		}
		if err == nil && id.String() != s {
			t.Fatalf("ParseID(%q) changed it to %q", s, id)
		}
	})
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"unix:uid:1000", "unix:path:/usr/bin/web", "unix:sha256:00", ":", "unix:", "x:y", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := ParseSelector(s)
		if err == nil && sel.String() != s {
			t.Fatalf("ParseSelector(%q) changed it to %q", s, sel)
		}
	})
}

func FuzzDecode(f *testing.F) {
	b, _ := Encode(valid())
	f.Add(b)
	f.Add([]byte(`{"v":1}`))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if e, err := Decode(b); err == nil {
			_ = e.Validate(td, now)
		}
	})
}

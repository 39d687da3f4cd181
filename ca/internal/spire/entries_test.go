package spire

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/entry"
)

var update = flag.Bool("update", false, "write the golden files anew")

var today = time.Date(2026, 11, 26, 9, 0, 0, 0, time.UTC)

// golden compares got with testdata/name.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func fixture(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// describe is all of an entry that SPIRE's could set.
func describe(e *Entry) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n  was %s, parent %s\n", e.SPIFFEID, e.Was, e.ParentID)
	for _, sel := range e.Selectors {
		fmt.Fprintf(&b, "  %s\n", sel)
	}
	fmt.Fprintf(&b, "  ttl %s, jwt %s, dns %q, hint %q, federates with %q, role %q", e.X509SVIDTTL, e.JWTSVIDTTL, e.DNSNames, e.Hint, e.FederatesWith, e.Role.Name)
	if !e.ExpiresAt.IsZero() {
		fmt.Fprintf(&b, ", until %s", e.ExpiresAt.Format(time.RFC3339))
	}
	return b.String() + "\n"
}

func TestEntriesOfASPIREServer(t *testing.T) {
	entries, remarks, err := Entries("entries.json", fixture(t, "entries.json"), nil, today)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for i := range entries {
		b.WriteString(describe(&entries[i]))
	}
	b.WriteString("\n")
	for _, r := range remarks {
		fmt.Fprintln(&b, r)
	}
	golden(t, "entries.golden", b.String())
}

// one is a document with one entry, below the only agent of a token, of which fields
// are set.
func one(fields string) string {
	return `{"entries": [{"id": "e1", "spiffe_id": {"trust_domain": "shop.test", "path": "/web"},
"parent_id": {"trust_domain": "shop.test", "path": "/spire/agent/join_token/t1"},
"selectors": [{"type": "unix", "value": "uid:1000"}]` + fields + `}]}`
}

func TestWhatIsNotMadeOfAnEntry(t *testing.T) {
	for name, c := range map[string]struct{ fields, want string }{
		"reserved SPIFFE ID": {"path /agent/x", "is reserved"},
		"an alias's ID":      {"path /agent/alias/x", "refuses it"},
		"no path":            {"path ", "has no path"},
		"downstream":         {`, "downstream": true`, "merlon token create --kind nested-ca"},
		"store_svid":         {`, "store_svid": true`, "secret stores"},
		"unknown key":        {`, "narrower": "yes"`, "unknown keys narrower"},
		"wildcard DNS":       {`, "dns_names": ["*.shop.test"]`, "dns_names"},
		"ended":              {`, "expires_at": "1"`, "it ended at 1970-01-01T00:00:01Z"},
		"after all years":    {`, "expires_at": "9223372036854775807"`, "after the year 9999"},
	} {
		t.Run(name, func(t *testing.T) {
			document := one(c.fields)
			if path, ok := strings.CutPrefix(c.fields, "path "); ok {
				document = strings.Replace(one(""), "/web", path, 1)
			}
			entries, remarks, err := Entries("f", []byte(document), nil, today)
			text := fmt.Sprint(err)
			for _, r := range remarks {
				if r.Missing {
					text += r.String()
				}
			}
			if len(entries) != 0 || !strings.Contains(text, c.want) {
				t.Errorf("made %d entries, and said %s; want none, and %q", len(entries), text, c.want)
			}
		})
	}
}

// A value that is none costs its own entry alone.
func TestBrokenEntryIsNamedAlone(t *testing.T) {
	for fields, want := range map[string]string{
		`, "x509_svid_ttl": -5`:          `x509_svid_ttl: "-5" is not a number`,
		`, "dns_names": "a"`:             "dns_names: ",
		`, "admin": "yes"`:               "admin: ",
		`, "expires_at": "tomorrow"`:     "expires_at: ",
		`, "hint": 1, "downstream": "x"`: "downstream: ",
	} {
		sound := strings.Replace(strings.TrimSuffix(strings.TrimPrefix(one(""), `{"entries": [`), `]}`), "e1", "e2", 1)
		document := strings.TrimSuffix(one(fields), "]}") + ",\n" + sound + "]}"
		entries, remarks, err := Entries("f", []byte(document), nil, today)
		if err != nil || len(entries) != 1 || entries[0].Was != "e2" {
			t.Errorf("%s: made %+v, %v; want the other entry alone", fields, entries, err)
		}
		if !slices.ContainsFunc(remarks, func(r Remark) bool {
			return r.Missing && strings.Contains(r.Of, "entry e1") && strings.Contains(r.Text, want)
		}) {
			t.Errorf("%s: %+v; want e1 named, with %q", fields, remarks, want)
		}
	}
}

// So does a key that is not known within a value.
func TestUnknownKeyOfAValueIsNamed(t *testing.T) {
	for before, after := range map[string]string{
		`"path": "/web"`:      `"path": "/web", "q": ""`,
		`"value": "uid:1000"`: `"value": "uid:1000", "q": true`,
	} {
		entries, remarks, err := Entries("f", []byte(strings.Replace(one(""), before, after, 1)), nil, today)
		if err != nil || len(entries) != 0 || len(remarks) != 1 || !remarks[0].Missing || !strings.Contains(remarks[0].Text, `unknown key "q"`) {
			t.Errorf("%s: made %d entries, %+v, %v; want none, and a remark", after, len(entries), remarks, err)
		}
	}
}

// Commands in remarks are ones that a shell takes as they are meant.
func TestCommandsInRemarksAreQuoted(t *testing.T) {
	for path, want := range map[string]string{
		"/spire/agent/join_token/a;id": "--agent 'a;id'",
		"/spire/agent/join_token/a'b":  `--agent 'a'\''b'`,
		"/spire/agent/moon/$(id)":      "--parent 'spiffe://shop.test/spire/agent/moon/$(id)=spiffe://shop.test/agent/NAME'",
		"/a b":                         "--parent 'spiffe://shop.test/a b=spiffe://shop.test/agent/NAME'",
	} {
		p, err := parents{}.of("spiffe://shop.test" + path)
		if said := p.note + fmt.Sprint(err); !strings.Contains(said, want) {
			t.Errorf("%s: %q; want %q in it", path, said, want)
		}
	}
}

func TestSelectors(t *testing.T) {
	for sel, want := range map[string]string{
		"unix:uid:1000":                        "unix:uid:1000",
		"unix:path:/usr/bin/web":               "unix:path:/usr/bin/web",
		"unix:supplementary_gid:5":             "unix:supplementary_gid:5",
		"k8s:ns:pay":                           "k8s:ns:pay",
		"k8s:pod-owner:StatefulSet:db":         "k8s:pod-owner:StatefulSet:db",
		"k8s:container-image:registry/web:1.2": "k8s:container-image:registry/web:1.2",
		"systemd:id:nginx.service":             "systemd:unit:nginx.service",
		"k8s:pod-image-count:2":                "",
		"k8s:pod-owner-uid:ReplicaSet:1":       "",
		"systemd:fragment_path:/etc/x.service": "",
		"docker:label:a:b":                     "",
		"docker:image_id:77af4d6b9913":         "",
		"windows:user_name:web":                "",
		"unix":                                 "",
		"custom:thing:1":                       "",
	} {
		typ, value, _ := strings.Cut(sel, ":")
		checkSelector(t, sel, want, typ, value, workloadSelector)
	}
	for sel, want := range map[string]string{
		"x509pop:subject:cn:web1":               "x509pop:subject-cn:web1",
		"k8s_psat:cluster:eu":                   "k8s:cluster:eu",
		"k8s_psat:agent_sa:spire-agent":         "k8s:service-account:spire-agent",
		"k8s_psat:agent_node_name:n1":           "k8s:node-name:n1",
		"aws_iid:account_id:123456789012":       "aws:account:123456789012",
		"aws_iid:az:eu-central-1a":              "aws:zone:eu-central-1a",
		"aws_iid:image:id:ami-1":                "aws:image-id:ami-1",
		"aws_iid:instance:id:i-1":               "aws:instance-id:i-1",
		"gcp_iit:project-id:shop":               "gcp:project:shop",
		"gcp_iit:sa:a@b.iam.example":            "gcp:service-account:a@b.iam.example",
		"azure_msi:subscription-id:AB":          "azure:subscription:ab",
		"azure_msi:vm-name:Group:VM":            "azure:resource-group:group azure:vm-name:vm",
		"azure_msi:vm-name:vm":                  "",
		"x509pop:ca:fingerprint:0beec7b5":       "",
		"x509pop:serialnumber:0a":               "",
		"k8s_psat:agent_node_label:a:b":         "",
		"k8s_sat:agent_ns:spire":                "",
		"aws_iid:tag:name:web":                  "",
		"aws_iid:sg:id:sg-1":                    "",
		"gcp_iit:label:a:b":                     "",
		"azure_msi:network-security-group:rg:x": "",
		"tpm_devid:subject:cn:x":                "",
		"unix:uid:1000":                         "",
	} {
		typ, value, _ := strings.Cut(sel, ":")
		checkSelector(t, sel, want, typ, value, nodeSelector)
	}
}

func checkSelector(t *testing.T, sel, want, typ, value string, f func(entry.Selector) ([]entry.Selector, error)) {
	t.Helper()
	got, err := f(entry.Selector{Type: typ, Value: value})
	var texts []string
	for _, s := range got {
		texts = append(texts, s.String())
	}
	if text := strings.Join(texts, " "); text != want || (err == nil) != (want != "") {
		t.Errorf("%s is %q here (%v); want %q", sel, text, err, want)
	}
}

func TestParents(t *testing.T) {
	p := parents{"spiffe://shop.test/spire/agent/x509pop/ab": {id: "spiffe://shop.test/agent/db1"}}
	for path, want := range map[string]string{
		"/spire/agent/join_token/t1":          "/agent/t1",
		"/spire/agent/k8s_psat/eu/u1":         "/agent/k8s/eu/u1",
		"/spire/agent/aws_iid/1/r/i":          "/agent/aws/1/r/i",
		"/spire/agent/gcp_iit/p/1":            "/agent/gcp/p/1",
		"/spire/agent/x509pop/ab":             "/agent/db1",
		"/spire/agent/x509pop/cd":             "",
		"/spire/agent/azure_msi/t/p":          "",
		"/spire/agent/k8s_sat/eu/u1":          "",
		"/spire/agent/aws_iid/1/r":            "",
		"/spire/agent/join_token/":            "",
		"/spire/agent/join_token":             "",
		"/spire/agent/cn/web":                 "",
		"/spire/server":                       "",
		"/some/workload":                      "",
		"":                                    "",
		"/spire/agent/gcp_iit/p/1/and/more":   "",
		"/spire/agent/join_token/t1/and/more": "",
	} {
		got, err := p.of("spiffe://shop.test" + path)
		if want != "" {
			want = "spiffe://shop.test" + want
		}
		if got.id != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q here (%v); want %q", path, got.id, err, want)
		}
	}
}

func TestDocumentsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"nothing":              {"", "f:1: want the object"},
		"a list":               {"[]", "f:1: want the object"},
		"no entries":           {"{}", `there is no "entries"`},
		"another document":     {`{"agents": []}`, `unknown key "agents"`},
		"more behind":          {"{\"entries\": []}\n{}", "f:2: there is something behind"},
		"twice":                {`{"entries": [], "entries": []}`, "is there twice"},
		"a page":               {`{"entries": [], "next_page_token": "x"}`, "one page"},
		"cut off":              {"{\"entries\": [\n{\"id\": \"x\"", "f:2: "},
		"a key twice":          {one(`, "admin": false, "admin": true`), `"admin" is there twice`},
		"a value of no object": {`{"entries": [7]}`, "want an object"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Entries("f", []byte(c.text), nil, today)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v; want %q", err, c.want)
			}
		})
	}
}

// Which node an alias is says --parent before the entries do.
func TestParentThatIsSaid(t *testing.T) {
	known := map[string]string{"spiffe://shop.test/nodes/eu": "spiffe://shop.test/agent/only"}
	entries, _, err := Entries("entries.json", fixture(t, "entries.json"), known, today)
	if err != nil {
		t.Fatal(err)
	}
	for i := range entries {
		if entries[i].Alias() {
			t.Errorf("%s is made", entries[i].SPIFFEID)
		}
		if entries[i].SPIFFEID.Path() == "/web" && entries[i].ParentID.Path() != "/agent/only" {
			t.Errorf("parent of /web = %s", entries[i].ParentID)
		}
	}
}

// drawDocument draws what an `entry show` could print.
func drawDocument(t *rapid.T) (data []byte, n int) {
	paths := []string{"/web", "/db", "/nodes/a", "/nodes/b", "/spire/server", "/spire/agent/join_token/t1", "/spire/agent/x509pop/ab", "/agent/x", ""}
	selectors := []string{"unix:uid:1000", "unix:path:/bin/web", "k8s:ns:pay", "docker:label:a:b", "k8s_psat:cluster:eu", "k8s_psat:agent_node_ip:1", "spiffe_id:spiffe://shop.test/spire/agent/join_token/t1", "unix:uid:-1"}
	type m = map[string]any
	id := func(label string) m {
		return m{"trust_domain": "shop.test", "path": rapid.SampledFrom(paths).Draw(t, label)}
	}
	list := []m{}
	n = rapid.IntRange(0, 8).Draw(t, "n")
	for i := range n {
		var sels []m
		for _, s := range rapid.SliceOfN(rapid.SampledFrom(selectors), 0, 3).Draw(t, "selectors") {
			typ, value, _ := strings.Cut(s, ":")
			sels = append(sels, m{"type": typ, "value": value})
		}
		list = append(list, m{
			"id": fmt.Sprintf("e%d", i), "spiffe_id": id("id"), "parent_id": id("parent"), "selectors": sels,
			"x509_svid_ttl": rapid.SampledFrom([]int{0, 60, 1 << 20}).Draw(t, "ttl"), "admin": rapid.Bool().Draw(t, "admin"),
			"downstream": rapid.Bool().Draw(t, "downstream"), "expires_at": rapid.SampledFrom([]string{"0", "1", "1893456000"}).Draw(t, "expires"),
		})
	}
	data, err := json.Marshal(m{"entries": list})
	if err != nil {
		t.Fatal(err)
	}
	return data, n
}

// Nothing is dropped silently, and nothing is widened: each entry is made, or named;
// one that is made asks for as many facts as SPIRE's, and is none that is more than
// a workload or an alias of nodes.
func TestEveryEntryIsMadeOrNamed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		data, n := drawDocument(t)
		all, err := readShown("f", data)
		if err != nil || len(all) != n {
			t.Fatalf("read %d entries of %d: %v", len(all), n, err)
		}
		entries, remarks, err := Entries("f", data, nil, today)
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			e := &all[i]
			made := slices.IndexFunc(entries, func(m Entry) bool { return m.Was == e.id })
			named := slices.ContainsFunc(remarks, func(r Remark) bool { return r.Of == e.name() })
			if made < 0 && !named {
				t.Fatalf("%+v is neither made nor named", e)
			}
			if made >= 0 && len(entries[made].Selectors) < len(unique(e.selectors)) {
				t.Fatalf("%+v became %+v", e, entries[made])
			}
			if made >= 0 && (e.downstream || e.expiresAt == 1) {
				t.Fatalf("%+v is made", e)
			}
		}
	})
}

func FuzzEntries(f *testing.F) {
	f.Add(fixture(f, "entries.json"))
	f.Add([]byte(one("")))
	f.Add([]byte(one(`, "unknown": {"a": [1]}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, remarks, err := Entries("f", data, nil, today)
		if err != nil && (entries != nil || remarks != nil) {
			t.Error("an error, and entries")
		}
		for i := range entries {
			if err := entries[i].Validate(entries[i].SPIFFEID.TrustDomain(), today); err != nil {
				t.Errorf("made %+v, which a CA refuses: %v", entries[i], err)
			}
		}
		for _, r := range remarks {
			if strings.ContainsAny(r.String(), "\n\r\x1b") {
				t.Errorf("remark %q writes to the terminal itself", r)
			}
		}
	})
}

// Policy bundles from folder to decision, and the ways to tamper with one
// (SECURITY.md T26, T27, T29).

package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const shop = "../../examples/policies/shop"

func newKey(t testing.TB) (*ecdsa.PrivateKey, []Key) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key, []Key{{KID: "policy-1", PublicKey: &key.PublicKey}}
}

func metadata(generation uint64) Metadata {
	return Metadata{Name: "main", TrustDomain: "shop.test", Generation: generation, IssuedAt: time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)}
}

func build(t testing.TB, dir string) []byte {
	t.Helper()
	raw, err := Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func sign(t testing.TB, unsigned []byte, md Metadata, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	signed, err := Sign(unsigned, md, "policy-1", key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// folder writes a policy folder of the given files.
func folder(t testing.TB, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		name = filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestBundleSurvivesBuildCheckSignVerifyAndDecides(t *testing.T) {
	key, keys := newKey(t)
	unsigned := build(t, shop)
	checked, err := Check(unsigned)
	if err != nil {
		t.Fatal(err)
	}
	md := metadata(7)
	md.NotAfter, md.Audience = md.IssuedAt.Add(time.Hour), []string{"spiffe://shop.test/orders"}
	got, err := Verify(sign(t, unsigned, md, key), keys, Expect{Name: "main", TrustDomain: "shop.test", MinGeneration: 7})
	if err != nil {
		t.Fatal(err)
	}
	checked.Metadata = md
	if diff := cmp.Diff(checked, got); diff != "" {
		t.Error(diff)
	}
	e, err := engine.New(t.Context(), engine.Source{Modules: got.Modules, Grants: got.Grants, Generation: 7})
	if err != nil {
		t.Fatal(err)
	}
	d := e.Authorize(t.Context(), &policy.Input{Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: policy.HTTP, Method: "GET", Path: "/orders/1"})
	if !d.Allow || d.RuleID != "web-reads-orders" || d.Revision != 7 {
		t.Errorf("decision = %+v", d)
	}
}

func TestEqualFoldersGiveEqualBundles(t *testing.T) {
	if !bytes.Equal(build(t, shop), build(t, shop)) {
		t.Error("two builds differ")
	}
}

func TestBuildNamesWhatIsWrong(t *testing.T) {
	const good = "grants:\n  - {id: a, tcp: {}}\n"
	tests := map[string]struct {
		files map[string]string
		want  string
	}{
		"empty":            {map[string]string{"README.md": "x"}, "has neither grants"},
		"typo":             {map[string]string{"g.yaml": "grants:\n  - {id: a, tpc: {}}\n"}, `g.yaml:2:13: grants[0]: unknown key "tpc" (did you mean "tcp"?)`},
		"duplicate":        {map[string]string{"a.yaml": good, "sub/b.yaml": good}, `sub/b.yaml:2:6: grant "a".id: is taken by the grant at a.yaml:2`},
		"http.send":        {map[string]string{"a.rego": "package authz\n\nallow if http.send({}).ok\n"}, "a.rego:3:10: http.send is not available"},
		"reserved package": {map[string]string{"a.rego": "package merlon\n"}, "a.rego:1:1: package merlon is reserved"},
		"reserved name":    {map[string]string{"merlon/merlon.rego": "package merlon\n"}, "merlon/merlon.rego: this name is Merlon's own"},
		"data":             {map[string]string{"g.yaml": good, "data.json": "{}"}, "data.json: data files are not supported"},
		"yml":              {map[string]string{"g.yml": good}, "g.yml: grants are in files that end in .yaml"},
		"name":             {map[string]string{"ä.rego": "package authz\n"}, "clean relative path of printable ASCII"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := Build(folder(t, tt.files)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v\ndoes not contain %q", err, tt.want)
			}
		})
	}
	if _, err := Build(filepath.Join(t.TempDir(), "absent")); err == nil {
		t.Error("an absent folder was built")
	}
}

func TestBuildLeavesTestsAndOtherFilesOut(t *testing.T) {
	f, err := unpack(build(t, folder(t, map[string]string{
		"g.yaml": "grants: []\n", "grants_test.yaml": "- x", "a_test.rego": "nonsense", ".git/x.rego": "nonsense", ".hidden.yaml": "nonsense", "notes.txt": "x", "lib/l.rego": "package lib\n", "a.rego": "package authz\n",
	})))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dataName, engine.ModuleName, "lib/l.rego", "a.rego"} {
		if _, ok := f[name]; !ok {
			t.Errorf("%s is missing", name)
		}
		delete(f, name)
	}
	if len(f) > 0 {
		t.Errorf("unexpected files: %v", f)
	}
}

func TestCheckRefuses(t *testing.T) {
	good, err := unpack(build(t, shop))
	if err != nil {
		t.Fatal(err)
	}
	without := func(change func(files)) files {
		f := files{}
		maps.Copy(f, good)
		change(f)
		return f
	}
	tests := map[string]struct {
		f    files
		want string
	}{
		"other module":  {without(func(f files) { f[engine.ModuleName] = []byte("package merlon\n\ndecision := {\"allow\": true}\n") }), "is not the one of this version"},
		"no module":     {without(func(f files) { delete(f, engine.ModuleName) }), "is not the one of this version"},
		"second module": {without(func(f files) { f["x.rego"] = []byte("package merlon\n\nx := 1\n") }), "package merlon is reserved"},
		"http.send":     {without(func(f files) { f["x.rego"] = []byte("package x\n\ny := http.send({})\n") }), "http.send is not available"},
		"no data":       {without(func(f files) { delete(f, dataName) }), "has no data.json"},
		"other data":    {without(func(f files) { f[dataName] = []byte(`{"merlon": {}, "authz": {"allow": true}}`) }), `"authz" beside "merlon"`},
		"no grants":     {without(func(f files) { f[dataName] = []byte(`{"merlon": {}}`) }), "has no grants"},
		"index only": {without(func(f files) {
			f[dataName] = []byte(`{"merlon": {"grants": {}, "index": {"*": {}}, "depths": {"to": [], "from": []}}}`)
		}), "was not made from its grants"},
		"bad grant":        {without(func(f files) { f[dataName] = []byte(`{"merlon": {"grants": {"a": {"from": [], "tcp": {}}}}}`) }), `grant "a".from: is empty`},
		"unknown in grant": {without(func(f files) { f[dataName] = []byte(`{"merlon": {"grants": {"a": {"form": [], "tcp": {}}}}}`) }), "unknown field"},
		"two values":       {without(func(f files) { f[dataName] = append(bytes.Clone(f[dataName]), "{}"...) }), "more than one JSON value"},
		"deep": {without(func(f files) {
			f[dataName] = []byte(`{"merlon": {"grants": {}, "index": ` + strings.Repeat("[", 1<<20))
		}), "max depth"},
		"signed":        {without(func(f files) { f[signaturesName] = []byte("{}") }), "send it unsigned"},
		"with manifest": {without(func(f files) { f[manifestName] = []byte("{}") }), "send it unsigned"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			raw, err := pack(tt.f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Check(raw); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v\ndoes not contain %q", err, tt.want)
			}
		})
	}
}

// T26: a bundle that is not wholly signed by a known key is refused.
func TestT26BundlesThatAreNotSigned(t *testing.T) {
	key, keys := newKey(t)
	other, _ := newKey(t)
	unsigned := build(t, shop)
	good, err := unpack(sign(t, unsigned, metadata(3), key))
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(files)) []byte {
		f := files{}
		for name, content := range good {
			f[name] = bytes.Clone(content)
		}
		change(f)
		raw, err := pack(f)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	var s signatures
	if err := json.Unmarshal(good[signaturesName], &s); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(s.Signatures[0], ".")
	withToken := func(tokens ...string) []byte {
		return with(func(f files) { f[signaturesName], _ = json.Marshal(signatures{Signatures: tokens}) })
	}
	withHeader := func(header string) []byte {
		return withToken(base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + parts[1] + "." + parts[2])
	}
	tests := map[string]struct {
		raw  []byte
		want string
	}{
		"unsigned":         {unsigned, "it is not signed"},
		"no signatures":    {with(func(f files) { f[signaturesName] = []byte(`{"signatures":[]}`) }), "0 signatures"},
		"two signatures":   {withToken(s.Signatures[0], s.Signatures[0]), "2 signatures"},
		"plugin":           {with(func(f files) { f[signaturesName] = []byte(`{"signatures":["` + s.Signatures[0] + `"],"plugin":"x"}`) }), "unknown field"},
		"other key":        {sign(t, unsigned, metadata(3), other), "the signature does not fit"},
		"unknown kid":      {withHeader(`{"alg":"ES256","kid":"policy-2"}`), `unknown key "policy-2"`},
		"no kid":           {withHeader(`{"alg":"ES256"}`), `unknown key ""`},
		"alg none":         {withHeader(`{"alg":"none","kid":"policy-1"}`), `algorithm is "none"`},
		"alg HS256":        {withHeader(`{"alg":"HS256","kid":"policy-1"}`), `algorithm is "HS256"`},
		"jwk in header":    {withHeader(`{"alg":"ES256","kid":"policy-1","jwk":{}}`), "unknown field"},
		"other header":     {withHeader(`{"kid":"policy-1","alg":"ES256"}`), "the signature does not fit"},
		"no JWT":           {withToken("x"), "no compact JWT"},
		"short signature":  {withToken(parts[0] + "." + parts[1] + "." + parts[2][:40]), "malformed"},
		"changed payload":  {withToken(parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"files":[],"iat":1}`)) + "." + parts[2]), "does not fit"},
		"changed data":     {with(func(f files) { f[dataName] = bytes.Replace(f[dataName], []byte("POST"), []byte("GETX"), 1) }), `"data.json" was changed`},
		"changed Rego":     {with(func(f files) { f["authz.rego"] = append(f["authz.rego"], '\n') }), `"authz.rego" was changed`},
		"changed manifest": {with(func(f files) { f[manifestName] = bytes.Replace(f[manifestName], []byte(`"3"`), []byte(`"9"`), 1) }), `".manifest" was changed`},
		"no manifest":      {with(func(f files) { delete(f, manifestName) }), "signed but missing"},
		"extra file":       {with(func(f files) { f["extra.rego"] = []byte("package authz\n\nallow := true\n") }), `"extra.rego" is not signed`},
		"missing file":     {with(func(f files) { delete(f, "authz.rego") }), `"authz.rego" is signed but missing`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := Verify(tt.raw, keys, Expect{}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v\ndoes not contain %q", err, tt.want)
			}
		})
	}
}

// T27: an older generation, validly signed, is a rollback.
func TestT27OlderGenerationsAreRefused(t *testing.T) {
	key, keys := newKey(t)
	unsigned := build(t, shop)
	for generation, want := range map[uint64]error{4: ErrOlder, 5: nil, 6: nil} {
		_, err := Verify(sign(t, unsigned, metadata(generation), key), keys, Expect{Name: "main", TrustDomain: "shop.test", MinGeneration: 5})
		if !errors.Is(err, want) {
			t.Errorf("generation %d after 5: %v; want %v", generation, err, want)
		}
	}
	signed := sign(t, unsigned, metadata(5), key)
	if _, err := Verify(signed, keys, Expect{Name: "other"}); err == nil {
		t.Error("a bundle of another name was accepted")
	}
	if _, err := Verify(signed, keys, Expect{TrustDomain: "other.test"}); err == nil {
		t.Error("a bundle of another trust domain was accepted")
	}
}

func TestSignRefusesIncompleteMetadataAndOtherKeys(t *testing.T) {
	key, _ := newKey(t)
	unsigned := build(t, shop)
	for name, change := range map[string]func(*Metadata){
		"name": func(m *Metadata) { m.Name = "" }, "trust domain": func(m *Metadata) { m.TrustDomain = "" },
		"generation": func(m *Metadata) { m.Generation = 0 }, "time": func(m *Metadata) { m.IssuedAt = time.Time{} },
	} {
		md := metadata(1)
		change(&md)
		if _, err := Sign(unsigned, md, "policy-1", key); err == nil {
			t.Errorf("signed without %s", name)
		}
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(unsigned, metadata(1), "policy-1", p384); err == nil {
		t.Error("signed with a P-384 key")
	}
	if _, err := Sign(sign(t, unsigned, metadata(1), key), metadata(2), "policy-1", key); err == nil {
		t.Error("signed twice")
	}
}

func gzipped(t testing.TB, write func(*gzip.Writer)) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	write(w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tarball(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	return gzipped(t, func(z *gzip.Writer) {
		w := tar.NewWriter(z)
		for _, h := range headers {
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, h.Size)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// T29: what is too large, too many or no plain file is refused before any
// other parser sees it.
func TestT29Bombs(t *testing.T) {
	file := func(name string) *tar.Header {
		return &tar.Header{Name: name, Mode: 0o644, Size: 1, Format: tar.FormatUSTAR}
	}
	kind := func(flag byte) *tar.Header {
		return &tar.Header{Name: "x.rego", Linkname: "/etc/passwd", Typeflag: flag, Format: tar.FormatUSTAR}
	}
	many := make([]*tar.Header, maxFiles+1)
	for i := range many {
		many[i] = file(fmt.Sprintf("%d.rego", i))
	}
	tests := map[string]struct {
		raw  []byte
		want string
	}{
		"compressed size": {make([]byte, MaxBytes+1), "more than 4194304 bytes"},
		"zeros": {gzipped(t, func(z *gzip.Writer) {
			for range 40 {
				_, _ = z.Write(make([]byte, 1<<20))
			}
		}), "more than 33554432 bytes when decompressed"},
		"one large file":   {tarball(t, &tar.Header{Name: "x.rego", Size: 33 << 20, Format: tar.FormatUSTAR}), "when decompressed"},
		"many files":       {tarball(t, many...), "more than 2000 files"},
		"symbolic link":    {tarball(t, kind(tar.TypeSymlink)), "is no plain file"},
		"hard link":        {tarball(t, kind(tar.TypeLink)), "is no plain file"},
		"character device": {tarball(t, kind(tar.TypeChar)), "is no plain file"},
		"pipe":             {tarball(t, kind(tar.TypeFifo)), "is no plain file"},
		"directory":        {tarball(t, &tar.Header{Name: "x/", Typeflag: tar.TypeDir, Format: tar.FormatUSTAR}), "is no plain file"},
		"parent":           {tarball(t, file("../x.rego")), "clean relative path"},
		"inner parent":     {tarball(t, file("a/../../x.rego")), "clean relative path"},
		"doubly absolute":  {tarball(t, file("//etc/x.rego")), "clean relative path"},
		"backslash":        {tarball(t, file(`..\x.rego`)), "clean relative path"},
		"control":          {tarball(t, file("a\nb.rego")), "clean relative path"},
		"twice":            {tarball(t, file("x.rego"), file("/x.rego")), "is in it twice"},
		"wasm":             {tarball(t, file("policy.wasm")), "data.json and .rego files only"},
		"patch":            {tarball(t, file("patch.json")), "data.json and .rego files only"},
		"nested data":      {tarball(t, file("authz/data.json")), "data.json and .rego files only"},
		"tests":            {tarball(t, file("x_test.rego")), "tests do not belong"},
		"extended header":  {tarball(t, &tar.Header{Name: "x.rego", Format: tar.FormatPAX, PAXRecords: map[string]string{"A.b": "c"}}), "is no plain file"},
		"GNU format":       {tarball(t, &tar.Header{Name: "x.rego", Format: tar.FormatGNU}), "not in the ustar format"},
		"not gzip":         {[]byte("hello"), "not gzip"},
		"empty":            {nil, "not gzip"},
		"trailing data":    {append(tarball(t), 'x'), "data after the end"},
		"second member":    {append(tarball(t), tarball(t)...), "data after the end"},
		"truncated gzip":   {tarball(t, file("x.rego"))[:40], "unexpected EOF"},
		"truncated tar":    {gzipped(t, func(z *gzip.Writer) { _, _ = z.Write(make([]byte, 100)) }), "truncated tarball"},
		"no end":           {gzipped(t, func(z *gzip.Writer) { _, _ = z.Write(make([]byte, 512)) }), "malformed end"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for _, parse := range []func([]byte) error{
				func(b []byte) error { _, err := Check(b); return err },
				func(b []byte) error { _, err := Verify(b, nil, Expect{}); return err },
			} {
				if err := parse(tt.raw); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v\ndoes not contain %q", err, tt.want)
				}
			}
		})
	}
}

// A GNU sparse file says that it is large without being so (CVE-2025-58183).
func TestT29SparseFilesAreRefused(t *testing.T) {
	header := make([]byte, 512)
	copy(header, "x.rego")
	copy(header[100:], "0000644\x00")
	copy(header[124:], "00000000000\x00")
	copy(header[136:], "00000000000\x00")
	copy(header[257:], "ustar\x00"+"00")
	header[156] = tar.TypeGNUSparse
	sum := 8 * int(' ')
	for _, b := range header {
		sum += int(b)
	}
	copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
	raw := gzipped(t, func(z *gzip.Writer) { _, _ = z.Write(append(header, make([]byte, 1024)...)) })
	if _, err := Check(raw); err == nil || !strings.Contains(err.Error(), "is no plain file") {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	key, keys := newKey(f)
	unsigned := build(f, shop)
	f.Add(unsigned, true)
	f.Add(sign(f, unsigned, metadata(1), key), true)
	ball, err := decompress(unsigned)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ball, false)
	f.Fuzz(func(t *testing.T, data []byte, compressed bool) {
		if !compressed {
			if len(data) > 1<<20 {
				return
			}
			data = gzipped(t, func(z *gzip.Writer) { _, _ = z.Write(data) })
		}
		if c, err := Verify(data, keys, Expect{}); err == nil && c.Metadata.Generation != 1 {
			t.Errorf("accepted what was never signed: %+v", c.Metadata)
		}
		if c, err := Check(data); err == nil && c.Modules[engine.ModuleName] != engine.Module {
			t.Error("accepted another module")
		}
	})
}

func manyGrants() string {
	var yaml strings.Builder
	yaml.WriteString("grants:\n")
	for i := range 10_000 {
		fmt.Fprintf(&yaml, "  - {id: g%d, from: [spiffe://shop.test/web-%d], to: [spiffe://shop.test/orders-%d], http: {methods: [GET], paths: [/orders, /orders/*]}}\n", i, i, i%100)
	}
	return yaml.String()
}

// BenchmarkActivate is what it takes to verify 10 000 grants and to decide by them,
// and the most memory that lives at once.
func BenchmarkActivate(b *testing.B) {
	key, keys := newKey(b)
	signed := sign(b, build(b, folder(b, map[string]string{"g.yaml": manyGrants()})), metadata(1), key)
	b.ReportAllocs()
	defer debug.SetGCPercent(debug.SetGCPercent(10)) // so that garbage hardly counts
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	done, peaked := make(chan struct{}), make(chan uint64)
	go func() {
		sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		peak := uint64(0)
		for {
			select {
			case <-done:
				peaked <- peak
				return
			case <-time.After(200 * time.Microsecond):
				metrics.Read(sample)
				peak = max(peak, sample[0].Value.Uint64())
			}
		}
	}()
	for b.Loop() {
		c, err := Verify(signed, keys, Expect{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := engine.New(b.Context(), engine.Source{Modules: c.Modules, Grants: c.Grants, Generation: 1}); err != nil {
			b.Fatal(err)
		}
	}
	close(done)
	b.ReportMetric(float64(<-peaked-before.HeapAlloc)/(1<<20), "peak-MiB")
}

// A candidate is never taken for the policy in force, nor that for a candidate: the mark
// is under the signature.
func TestCandidatesAreMarked(t *testing.T) {
	key, keys := newKey(t)
	unsigned := build(t, shop)
	for _, candidate := range []bool{false, true} {
		md := metadata(7)
		md.Candidate = candidate
		signed := sign(t, unsigned, md, key)
		c, err := Verify(signed, keys, Expect{Candidate: candidate})
		if err != nil || c.Metadata.Candidate != candidate {
			t.Errorf("candidate %v: %+v, %v", candidate, c, err)
		}
		if _, err := Verify(signed, keys, Expect{Candidate: !candidate}); err == nil {
			t.Errorf("candidate %v is taken for the other kind", candidate)
		}
		if _, err := Unsign(signed, keys, Expect{Candidate: !candidate}); err == nil {
			t.Errorf("candidate %v is unsigned as the other kind", candidate)
		}
		// Without the mark, or with one, the signature does not fit.
		f, err := unpack(signed)
		if err != nil {
			t.Fatal(err)
		}
		if marked := bytes.Contains(f[manifestName], []byte(`"candidate":true`)); marked != candidate {
			t.Errorf("candidate %v: manifest %s", candidate, f[manifestName])
		}
		f[manifestName] = bytes.Replace(f[manifestName], []byte(`,"candidate":true`), nil, 1)
		if !candidate {
			f[manifestName] = bytes.Replace(f[manifestName], []byte(`"generation":7`), []byte(`"generation":7,"candidate":true`), 1)
		}
		forged, err := pack(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(forged, keys, Expect{Candidate: !candidate}); err == nil {
			t.Errorf("candidate %v: the mark was changed, and nobody noticed", candidate)
		}
	}
}

// A policy folder may have a link to what has no end.
func TestFilesAreReadAsFarAsTheyMayBeLong(t *testing.T) {
	name := filepath.Join(t.TempDir(), "g.yaml")
	if err := os.WriteFile(name, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]string{3: "0123", 9: "0123456789", 10: "0123456789"} {
		if got, err := readAtMost(name, limit); string(got) != want || err != nil {
			t.Errorf("%d bytes: %q, %v", limit, got, err)
		}
	}
}

// A folder in which a file has no end is refused at the bound, and not when there is
// no memory left.
func TestAFolderIsReadAsFarAsItMayBeLong(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(t.TempDir(), "endless")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(pipe, filepath.Join(dir, "g.yaml")); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(pipe, make([]byte, 2*maxUncompressedBytes), 0o600) }()
	if _, err := ReadFolder(dir); err == nil || !strings.Contains(err.Error(), "more than 2000 files or 33554432 bytes") {
		t.Errorf("ReadFolder() = %v; want a refusal by size", err)
	}
	if err := <-written; !errors.Is(err, unix.EPIPE) {
		t.Errorf("the file was read to its end (%v)", err)
	}
}

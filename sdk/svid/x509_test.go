// Each MUST of the X509-SVID standard for a validator, by a forged document that
// breaks it. Where go-spiffe v2.9.0 accepts the forgery, the test says so and fails
// on the day when that changes.

package svid_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func checkRule(t *testing.T, err error, rule string) {
	t.Helper()
	e, ok := errors.AsType[*svid.Error](err)
	if !ok {
		t.Fatalf("error = %v; want a refusal by rule %s", err, rule)
	}
	if e.Rule != rule {
		t.Errorf("refused by rule %s: %v; want rule %s", e.Rule, e, rule)
	}
	if e.Reason == "" {
		t.Error("the refusal gives no reason")
	}
}

var (
	noKeyUsage         forge.Change = func(c *x509.Certificate) { c.KeyUsage = 0 }
	noBasicConstraints forge.Change = func(c *x509.Certificate) { c.BasicConstraintsValid = false }
	uncriticalKeyUsage              = forge.Extension(forge.KeyUsage, false, []byte{3, 2, 7, 128}) // digitalSignature
	uncriticalCertSign              = forge.Extension(forge.KeyUsage, false, []byte{3, 2, 1, 6})   // keyCertSign, cRLSign
	uncriticalCAIsTrue              = forge.Extension(forge.BasicConstraints, false, []byte{0x30, 3, 1, 1, 0xff})
	withName           forge.Change = func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "web"} }
	isCA               forge.Change = func(c *x509.Certificate) { c.IsCA = true }
	expired            forge.Change = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }
	notYet             forge.Change = func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }
	codeSigning        forge.Change = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }
	serverOnly         forge.Change = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	anyUsage           forge.Change = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }
	noSubjectKeyID     forge.Change = func(c *x509.Certificate) {
		c.SubjectKeyId, c.ExtraExtensions = nil, append(c.ExtraExtensions, pkix.Extension{Id: []int{2, 5, 29, 14}, Value: []byte{4, 0}})
	}
)

func usage(bits x509.KeyUsage) forge.Change {
	return func(c *x509.Certificate) { c.KeyUsage = bits }
}

func unknownCritical(c *x509.Certificate) {
	forge.Extension([]int{1, 2, 3, 4}, true, []byte{5, 0})(c)
}

// Rules on the leaf.
func TestForgedLeavesAreRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	intermediate := ca.Intermediate()
	long := "/" + strings.Repeat("a", 2048)
	tests := map[string]struct {
		svid     *forge.SVID
		rule     string
		goSPIFFE bool // go-spiffe alone accepts it
	}{
		"X2 two SPIFFE IDs":             {ca.Leaf("/", forge.URIs("spiffe://example.org/a", "spiffe://example.org/b")), "X2", false},
		"X2 SPIFFE ID and https":        {ca.Leaf("/", forge.URIs("spiffe://example.org/a", "https://example.org/")), "X2", false},
		"X2 the same SPIFFE ID twice":   {ca.Leaf("/", forge.URIs("spiffe://example.org/a", "spiffe://example.org/a")), "X2", false},
		"X4 root path":                  {ca.Leaf(""), "X4", true},
		"X4 root path, intermediate":    {intermediate.Leaf(""), "X4", true},
		"X5 SAN not critical":           {ca.Leaf("/", forge.RawURIs(false, "spiffe://example.org/a")), "X5", true},
		"X7 the root itself":            {ca.SelfAsSVID(), "X4", false},
		"X7 the intermediate itself":    {intermediate.SelfAsSVID(), "X4", false},
		"X10 no keyUsage":               {ca.Leaf("/a", noKeyUsage), "X10", true},
		"X10 keyUsage not critical":     {ca.Leaf("/a", uncriticalKeyUsage), "X10", true},
		"X11 no digitalSignature":       {ca.Leaf("/a", usage(x509.KeyUsageKeyAgreement)), "X11", true},
		"X12 codeSigning":               {ca.Leaf("/a", codeSigning), "X12", true},
		"X12 serverAuth alone":          {ca.Leaf("/a", serverOnly), "X12", true},
		"X12 any":                       {ca.Leaf("/a", anyUsage), "X12", true},
		"X13 expired":                   {ca.Leaf("/a", expired), "X13", false},
		"X13 not valid yet":             {ca.Leaf("/a", notYet), "X13", false},
		"X13 unknown critical":          {ca.Leaf("/a", unknownCritical), "X13", false},
		"X12 extended key usage: none":  {ca.Leaf("/a", extension([]int{2, 5, 29, 37}, false, 0x30, 0)), "X12", true},
		"X13 extension and more bytes":  {ca.Leaf("/a", extension([]int{2, 5, 29, 37}, false, 0x30, 0, 5, 0)), "X13", true},
		"X13 names no key":              {ca.Leaf("/a", extension(authorityKeyID, false, 0x30, 0)), "X13", true},
		"X13 names another key":         {ca.Leaf("/a", extension(authorityKeyID, false, 0x30, 3, 0x80, 1, 7)), "X13", true},
		"X13 names another certificate": {ca.Leaf("/a", extension(authorityKeyID, false, slices.Concat([]byte{0x30, 25, 0x80, 20}, ca.Cert.SubjectKeyId, []byte{0x82, 1, 7})...)), "X13", true},
		"X14 no URI SAN":                {ca.Leaf("/a", forge.URIs()), "X14", false},
		"X14 scheme https":              {ca.Leaf("/", forge.URIs("https://example.org/a")), "X14", false},
		"X14 no scheme":                 {ca.Leaf("/", forge.URIs("//example.org/a")), "X14", false},
		"X14 CA:TRUE":                   {ca.Leaf("/a", isCA), "X14", false},
		"X14 keyCertSign":               {ca.Leaf("/a", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign)), "X14", false},
		"X14 cRLSign":                   {ca.Leaf("/a", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCRLSign)), "X14", false},
		"X14 no basicConstraints":       {ca.Leaf("/a", noBasicConstraints), "X14", true},
		"ID1 query":                     {ca.Leaf("/", forge.URIs("spiffe://example.org/a?b")), "ID5", false},
		"ID1 empty query":               {ca.Leaf("/", forge.RawURIs(true, "spiffe://example.org/a?")), "ID5", false},
		"ID1 fragment":                  {ca.Leaf("/", forge.URIs("spiffe://example.org/a#b")), "ID5", false},
		"ID1 empty fragment":            {ca.Leaf("/", forge.RawURIs(true, "spiffe://example.org/a#")), "ID5", true},
		"ID2 user":                      {ca.Leaf("/", forge.URIs("spiffe://u@example.org/a")), "ID5", false},
		"ID2 empty user":                {ca.Leaf("/", forge.RawURIs(true, "spiffe://@example.org/a")), "ID5", false},
		"ID2 port":                      {ca.Leaf("/", forge.URIs("spiffe://example.org:80/a")), "ID5", false},
		"ID2 empty port":                {ca.Leaf("/", forge.RawURIs(true, "spiffe://example.org:/a")), "ID5", false},
		"ID3 upper-case trust domain":   {ca.Leaf("/", forge.URIs("spiffe://EXAMPLE.org/a")), "ID5", false},
		"ID5 trailing slash":            {ca.Leaf("/", forge.URIs("spiffe://example.org/a/")), "ID5", false},
		"ID5 only a slash":              {ca.Leaf("/"), "ID5", false},
		"ID5 empty segment":             {ca.Leaf("/a//b"), "ID5", false},
		"ID5 dots":                      {ca.Leaf("/a/../b"), "ID5", false},
		"ID5 percent-encoding":          {ca.Leaf("/", forge.RawURIs(true, "spiffe://example.org/%61")), "ID5", false},
		"ID5 percent-encoded dots":      {ca.Leaf("/", forge.RawURIs(true, "spiffe://example.org/%2e%2e/a")), "ID5", false},
		"ID6 2049 bytes":                {ca.Leaf(long[:2049-len("spiffe://example.org")]), "ID6", true},
		"ID7 trust domain of 256 bytes": {ca.Leaf("/", forge.URIs("spiffe://"+strings.Repeat("a", 256)+"/a")), "ID7", false},
		"X17 unknown trust domain":      {forge.New(t, "other.org").Leaf("/a"), "X17", false},
		"X13 root of the same name":     {forge.New(t, "example.org").Leaf("/a"), "X13", false},
		"X13 intermediate left out":     {&forge.SVID{Chain: intermediate.Leaf("/a").Chain[:1]}, "X13", false},
		"CAP nothing presented":         {&forge.SVID{}, "CAP", false},
		"CAP nine certificates":         {&forge.SVID{Chain: slices.Repeat(ca.Leaf("/a").Chain, 9)}, "CAP", true},
		"CAP more than 64 KiB of chain": {ca.Leaf("/a", forge.Extension([]int{1, 2, 3}, false, make([]byte, 65<<10))), "CAP", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := svid.VerifyChain(tt.svid.Chain, ca.Bundle(), time.Now())
			checkRule(t, err, tt.rule)
			_, err = svid.VerifyRawChain(tt.svid.Raw(), ca.Bundle(), time.Now())
			checkRule(t, err, tt.rule)
			_, err = svid.NewTrust(x509bundle.NewSet(ca.Bundle().X509Bundle())).VerifyChain(tt.svid.Chain, time.Now())
			checkRule(t, err, tt.rule)
			if _, _, err := x509svid.Verify(tt.svid.Chain, ca.Bundle()); (err == nil) != tt.goSPIFFE {
				t.Errorf("go-spiffe alone: %v; want accepted = %t", err, tt.goSPIFFE)
			}
		})
	}
}

// Rules on what is above the leaf.
func TestForgedAuthoritiesAreRefused(t *testing.T) {
	const td = "example.org"
	constrained := func(permitted string) forge.Change {
		return func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{permitted}, true
		}
	}
	pathLenZero := func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }
	tests := map[string]struct {
		issuer   *forge.Authority
		rule     string
		goSPIFFE bool
	}{
		"X6 intermediate has a path":               {forge.New(t, td).Intermediate(forge.URIs("spiffe://example.org/ca")), "X6", true},
		"X6 root has a path":                       {forge.New(t, td, forge.URIs("spiffe://example.org/ca")), "X6", true},
		"X2 intermediate has two URIs":             {forge.New(t, td).Intermediate(forge.URIs("spiffe://example.org", "https://x")), "X2", true},
		"X8 intermediate CA:FALSE":                 {forge.New(t, td).Intermediate(func(c *x509.Certificate) { c.IsCA = false }), "X13", false},
		"X8 intermediate lacks basicConstraints":   {forge.New(t, td).Intermediate(noBasicConstraints), "X13", false},
		"X8 basicConstraints not critical":         {forge.New(t, td).Intermediate(uncriticalCAIsTrue), "X8", true},
		"X9 constrained to another trust domain":   {forge.New(t, td).Intermediate(constrained("other.org")), "X13", false},
		"X9 constrained root":                      {forge.New(t, td, constrained("other.org")), "X13", false},
		"X9 a host permits none below it":          {forge.New(t, td).Intermediate(constrained("org")), "X9", true},
		"X9 constraint on an address":              {forge.New(t, "10.0.0.1").Intermediate(constrained("10.0.0.1.test")), "X13", false},
		"X10 intermediate lacks keyUsage":          {forge.New(t, td).Intermediate(noKeyUsage), "X10", true},
		"X10 root lacks keyUsage":                  {forge.New(t, td, noKeyUsage), "X10", true},
		"X10 keyUsage not critical":                {forge.New(t, td).Intermediate(uncriticalCertSign), "X10", true},
		"X11 intermediate lacks keyCertSign":       {forge.New(t, td).Intermediate(usage(x509.KeyUsageCRLSign)), "X13", false},
		"X12 intermediate limited to code signing": {forge.New(t, td).Intermediate(codeSigning), "X12", true},
		"X12 intermediate with any":                {forge.New(t, td).Intermediate(anyUsage), "X12", true},
		"X13 path too long":                        {forge.New(t, td).Intermediate(pathLenZero).Intermediate(), "X13", false},
		"X13 intermediate expired":                 {forge.New(t, td).Intermediate(expired), "X13", false},
		"X13 root expired":                         {forge.New(t, td, expired), "X13", false},
		"X13 root lacks a subject":                 {forge.New(t, td, func(c *x509.Certificate) { c.Subject = pkix.Name{} }).Intermediate(), "X13", true},
		"X13 intermediate names another key":       {forge.New(t, td).Intermediate(extension(authorityKeyID, false, 0x30, 3, 0x80, 1, 7)), "X13", true},
		"X13 intermediate lacks a subject key ID":  {forge.New(t, td).Intermediate(noSubjectKeyID), "X13", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			leaf := tt.issuer.Leaf("/a")
			_, err := svid.VerifyChain(leaf.Chain, tt.issuer.Bundle(), time.Now())
			checkRule(t, err, tt.rule)
			_, err = svid.NewTrust(x509bundle.NewSet(tt.issuer.Bundle().X509Bundle())).VerifyChain(leaf.Chain, time.Now())
			checkRule(t, err, tt.rule)
			if _, _, err := x509svid.Verify(leaf.Chain, tt.issuer.Bundle()); (err == nil) != tt.goSPIFFE {
				t.Errorf("go-spiffe alone: %v; want accepted = %t", err, tt.goSPIFFE)
			}
		})
	}
}

// A leaf that someone put among the roots proves nothing, neither itself nor
// what it signed.
func TestX7CertificatesOfTheBundleAuthenticateNobody(t *testing.T) {
	ca := forge.New(t, "example.org")
	leaf := ca.Leaf("/a")
	bundle := ca.Bundle().X509Bundle()
	bundle.AddX509Authority(leaf.Chain[0])
	if _, _, err := x509svid.Verify(leaf.Chain, bundle); err != nil {
		t.Errorf("go-spiffe alone refuses it: %v", err)
	}
	_, err := svid.VerifyChain(leaf.Chain, bundle, time.Now())
	checkRule(t, err, "X7")
}

// X17: a root speaks for its own trust domain, also when others are loaded.
func TestX17RootOfAnotherTrustDomain(t *testing.T) {
	a, b := forge.New(t, "a.org"), forge.New(t, "b.org")
	stolen := a.Leaf("/", forge.URIs("spiffe://b.org/web"))
	set := x509bundle.NewSet(a.Bundle().X509Bundle(), b.Bundle().X509Bundle())
	_, err := svid.VerifyChain(stolen.Chain, set, time.Now())
	checkRule(t, err, "X13")
	_, err = svid.VerifyChain(stolen.Chain, wrongBundle{a.Bundle().X509Bundle()}, time.Now())
	checkRule(t, err, "X17")
	_, err = svid.VerifyChain(stolen.Chain, nil, time.Now())
	checkRule(t, err, "X17")
}

// wrongBundle answers with the same bundle whatever it is asked.
type wrongBundle struct{ *x509bundle.Bundle }

func (w wrongBundle) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return w.Bundle, nil
}

// A presented root is no trust anchor.
func TestPresentedRootsCountForNothing(t *testing.T) {
	ca, impostor := forge.New(t, "example.org"), forge.New(t, "example.org")
	leaf := impostor.Leaf("/a")
	_, err := svid.VerifyChain(append(leaf.Chain, impostor.Cert), ca.Bundle(), time.Now())
	checkRule(t, err, "X13")
}

func TestX13WeakAndHugeKeysAreRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]any{"P-224": &p224.PublicKey, "RSA 1024": &weak.PublicKey} {
		leaf := ca.Leaf("/a")
		altered := *leaf.Chain[0]
		altered.PublicKey = key
		_, err := svid.VerifyChain([]*x509.Certificate{&altered}, ca.Bundle(), time.Now())
		checkRule(t, err, "X13")
		if !strings.Contains(err.Error(), "not accepted") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSoundSVIDsAreAccepted(t *testing.T) {
	const td = "example.org"
	longest := "/" + strings.Repeat("a", 2047-len("spiffe://example.org"))
	tests := map[string]struct {
		issuer  *forge.Authority
		path    string
		changes []forge.Change
	}{
		"below the root":           {forge.New(t, td), "/a", nil},
		"below an intermediate":    {forge.New(t, td).Intermediate(), "/a", nil},
		"below two":                {forge.New(t, td).Intermediate().Intermediate(), "/a", nil},
		"with a subject":           {forge.New(t, td), "/a", []forge.Change{withName}},
		"X12 without EKU":          {forge.New(t, td), "/a", []forge.Change{func(c *x509.Certificate) { c.ExtKeyUsage = nil }}},
		"X6 root without URI":      {forge.New(t, td, forge.URIs()), "/a", nil},
		"ID4 address":              {forge.New(t, "10.0.0.1"), "/a", nil},
		"ID4 underscore":           {forge.New(t, "_"), "/a", nil},
		"ID6 2048 bytes":           {forge.New(t, td), longest, nil},
		"ID8 scheme in upper case": {forge.New(t, td), "/a", []forge.Change{forge.RawURIs(true, "SPIFFE://example.org/a")}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			leaf := tt.issuer.Leaf(tt.path, tt.changes...)
			peer, err := svid.VerifyRawChain(leaf.Raw(), tt.issuer.Bundle(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			want := "spiffe://" + tt.issuer.TrustDomain.Name() + tt.path
			if peer.ID.String() != want || !peer.OurSerial || peer.Serial.Agent != 1 || peer.Serial.Revision != 100 {
				t.Errorf("peer = %+v; want %s through agent 1 at revision 100", peer, want)
			}
		})
	}
}

func TestPeerSaysWhoVouches(t *testing.T) {
	ca := forge.New(t, "example.org")
	soon := time.Now().Add(10 * time.Minute).UTC().Truncate(time.Second)
	intermediate := ca.Intermediate(func(c *x509.Certificate) { c.NotAfter = soon })
	leaf := intermediate.Leaf("/a")
	peer, err := svid.VerifyChain(leaf.Chain, ca.Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{hex.EncodeToString(intermediate.Cert.SubjectKeyId), hex.EncodeToString(ca.Cert.SubjectKeyId)}
	if !slices.Equal(peer.AuthorityIDs, want) {
		t.Errorf("AuthorityIDs = %v; want %v", peer.AuthorityIDs, want)
	}
	if !peer.NotAfter.Equal(soon) {
		t.Errorf("NotAfter = %s; want %s, the intermediate's", peer.NotAfter, soon)
	}
	if peer.SerialHex != leaf.Chain[0].SerialNumber.Text(16) || peer.SerialHex != peer.Serial.String() {
		t.Errorf("SerialHex = %s", peer.SerialHex)
	}
}

func TestTimeIsTheCallers(t *testing.T) {
	ca := forge.New(t, "example.org")
	leaf := ca.Leaf("/a")
	for _, after := range []time.Duration{-2 * time.Minute, 2 * time.Hour} {
		_, err := svid.VerifyChain(leaf.Chain, ca.Bundle(), time.Now().Add(after))
		checkRule(t, err, "X13")
		if e, _ := errors.AsType[*svid.Error](err); !e.Expired() {
			t.Errorf("at %s: Expired() = false for %v", after, err)
		}
	}
	_, err := svid.VerifyChain(leaf.Chain, ca.Bundle(), time.Time{})
	checkRule(t, err, "X13")
	impostor := forge.New(t, "example.org").Leaf("/a")
	if _, err := svid.VerifyChain(impostor.Chain, ca.Bundle(), time.Now()); err != nil {
		if e, _ := errors.AsType[*svid.Error](err); e.Expired() {
			t.Errorf("Expired() = true for %v", err)
		}
	}
}

// The subject's attribute is longer than its value, and crypto/x509 does not mind.
func TestX13MalformedSubjectIsRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	tbs := ca.Leaf("/a", withName).Chain[0].RawTBSCertificate
	der := ca.SignTBS(bytes.Replace(tbs, []byte("\x13\x03web"), []byte("\x13\x01web"), 1))
	if _, _, err := x509svid.ParseAndVerify([][]byte{der}, ca.Bundle()); err != nil {
		t.Errorf("go-spiffe alone refuses it: %v", err)
	}
	_, err := svid.VerifyRawChain([][]byte{der}, ca.Bundle(), time.Now())
	checkRule(t, err, "X13")
}

// ID10: the name is inside the signed part.
func TestID10FlippedBitsAreRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	raw := ca.Leaf("/workload").Raw()
	at := bytes.Index(raw[0], []byte("/workload"))
	raw[0][at+1] ^= 1
	_, err := svid.VerifyRawChain(raw, ca.Bundle(), time.Now())
	checkRule(t, err, "X13")
}

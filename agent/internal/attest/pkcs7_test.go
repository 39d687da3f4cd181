// Signed messages as openssl writes them, in DER and with lengths left open, and
// what is left of their verification when the parts are put together again.

package attest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const identityDocument = `{
  "accountId" : "123456789012",
  "instanceId" : "i-0123456789abcdef0",
  "pendingTime" : "2026-11-26T04:00:00Z",
  "region" : "eu-central-1"
}`

var signerKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// signedByOpenSSL has openssl sign document, as the options of `openssl cms` say.
func signedByOpenSSL(t testing.TB, document string, options ...string) (message []byte, key *rsa.PublicKey) {
	t.Helper()
	private, err := signerKey()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{Organization: []string{"Cloud"}}, NotAfter: time.Now().Add(time.Hour), SubjectKeyId: []byte{7}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	signer, in := filepath.Join(dir, "signer.pem"), filepath.Join(dir, "document")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})...)
	for path, data := range map[string][]byte{signer: both, in: []byte(document)} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var said strings.Builder
	arguments := append([]string{"cms", "-sign", "-binary", "-md", "sha256", "-signer", signer, "-inkey", signer, "-in", in, "-outform", "DER"}, options...)
	cmd := exec.CommandContext(t.Context(), "openssl", arguments...)
	cmd.Stderr = &said
	if message, err = cmd.Output(); err != nil {
		t.Fatalf("openssl cms: %v: %s", err, &said)
	}
	return message, &private.PublicKey
}

// openLengths is what Amazon's messages look like.
var openLengths = []string{"-nodetach", "-nocerts", "-stream", "-indef"}

func TestSignedMessageIsTakenApart(t *testing.T) {
	long := strings.Repeat(identityDocument, 40) // in several pieces, where it is cut
	for name, tc := range map[string]struct {
		document string
		options  []string
	}{
		"lengths left open":                {identityDocument, openLengths},
		"cut into pieces":                  {long, openLengths},
		"DER":                              {identityDocument, []string{"-nodetach", "-nocerts"}},
		"with the certificate":             {identityDocument, []string{"-nodetach"}},
		"with it, and lengths left open":   {identityDocument, []string{"-nodetach", "-stream", "-indef"}},
		"with few attributes, as Amazon's": {identityDocument, []string{"-nodetach", "-nocerts", "-nosmimecap"}},
	} {
		message, key := signedByOpenSSL(t, tc.document, tc.options...)
		s, err := openSigned(message)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if string(s.content) != tc.document {
			t.Errorf("%s: the content is %q", name, s.content)
		}
		signed, digest := sha256.Sum256(s.attributes), sha256.Sum256(s.content)
		if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, signed[:], s.signature); err != nil || !bytes.Contains(s.attributes, digest[:]) {
			t.Errorf("%s: the signature over the attributes: %v; the content's digest is in them: %t", name, err, bytes.Contains(s.attributes, digest[:]))
		}
	}
}

func TestMessagesThatAreNotTakenApart(t *testing.T) {
	good, _ := signedByOpenSSL(t, identityDocument, openLengths...)
	of := func(options ...string) []byte {
		message, _ := signedByOpenSSL(t, identityDocument, options...)
		return message
	}
	for name, message := range map[string][]byte{
		"nothing":                nil,
		"without its content":    of("-nocerts"),
		"without attributes":     of("-nodetach", "-nocerts", "-noattr"),
		"a signer by key ID":     of("-nodetach", "-nocerts", "-keyid"),
		"with two signers":       twoSigners(t),
		"something behind":       append(slices.Clone(good), 0),
		"cut off":                good[:len(good)-1],
		"a document":             []byte(identityDocument),
		"other content":          bytes.Replace(good, dataOID, signedDataOID, 1),
		"another kind":           bytes.Replace(good, signedDataOID, dataOID, 1),
		"nested without end":     bytes.Repeat([]byte{0x30, 0x80}, 20_000),
		"a length of 4 GiB":      {0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0},
		"a length of 5 bytes":    {0x30, 0x85, 0, 0, 0, 0, 1, 0},
		"a length cut off":       {0x30, 0x82, 1},
		"a tag of several":       {0x3f, 0x81, 0x01, 0},
		"a tag and nothing":      {0x30},
		"an end that is missing": {0x30, 0x80, 0x02, 0x01, 0x01},
	} {
		if s, err := openSigned(message); err == nil {
			t.Errorf("%s: it is taken apart into %q", name, s.content)
		}
	}
}

func TestElementsThatAreNone(t *testing.T) {
	deep := func(levels int) []byte {
		return append(bytes.Repeat([]byte{0x30, 0x80}, levels), make([]byte, 2*levels)...)
	}
	if _, _, rest, err := element(deep(maxBERDepth), 0); err != nil || len(rest) != 0 {
		t.Errorf("%d elements in one another: %v, and %d bytes follow", maxBERDepth, err, len(rest))
	}
	for name, b := range map[string][]byte{"too deep": deep(maxBERDepth + 2), "a primitive whose length is left open": {0x04, 0x80, 0, 0}} {
		if _, body, _, err := element(b, 0); err == nil {
			t.Errorf("%s: it is read as %x", name, body)
		}
	}
}

func twoSigners(t *testing.T) []byte {
	t.Helper()
	second := filepath.Join(t.TempDir(), "second.pem")
	cmd := exec.CommandContext(t.Context(), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", second+".key", "-out", second, "-subj", "/O=Other")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("openssl req: %v: %s", err, out)
	}
	message, _ := signedByOpenSSL(t, identityDocument, "-nodetach", "-nocerts", "-signer", second, "-inkey", second+".key")
	return message
}

func FuzzSignedMessage(f *testing.F) {
	for _, options := range [][]string{openLengths, {"-nodetach"}, {"-nodetach", "-nocerts", "-noattr"}} {
		message, _ := signedByOpenSSL(f, identityDocument, options...)
		f.Add(message)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		s, err := openSigned(message)
		if (s == nil) == (err == nil) {
			t.Fatalf("%v, error %v", s, err)
		}
		if err != nil {
			return
		}
		if !bytes.Contains(message, s.signature) || len(s.content) > len(message) {
			t.Fatalf("what was taken out was not there")
		}
		if tag, body, rest, err := element(s.attributes, 0); err != nil || tag != berSet || len(rest) != 0 || !bytes.Contains(message, body) {
			t.Fatalf("the attributes are %x: %v", s.attributes, err)
		}
	})
}

// Whatever a metadata server answers, the token is a member of the answer, or none.
func FuzzAccessToken(f *testing.F) {
	for _, s := range []string{`{"access_token":"a.b.c","expires_in":"3599"}`, `{"Access_Token":"a"}`, `{"access_token":1}`, `{"access_token":""}`, `[]`, `null`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		token, err := accessToken(body)
		if (token == "") == (err == nil) {
			t.Fatalf("%q: %q, %v", body, token, err)
		}
		if err != nil {
			return
		}
		texts := map[any]bool{}
		for dec := json.NewDecoder(bytes.NewReader(body)); ; {
			part, err := dec.Token()
			if err != nil {
				break
			}
			if text, ok := part.(string); ok {
				texts[text] = true
			}
		}
		if !texts[token] {
			t.Fatalf("%q is not in %q", token, body)
		}
	})
}

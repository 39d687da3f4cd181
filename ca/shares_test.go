// Who gets which grants of a policy bundle.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store"
	"merlon.dev/policy/bundle"
)

const forEverybody = `grants:
  - {id: to-orders, from: [spiffe://shop.test/a-secret-caller], to: [spiffe://shop.test/orders], http: {}}
  - {id: to-stock, to: [spiffe://shop.test/stock], http: {}}
  - {id: to-all, http: {paths: [/health]}}
  - {id: below-ns, to: ["spiffe://shop.test/ns/*"], http: {}}
`

// push pushes the grants in text, and Rego if it is not empty, and returns the keys that
// verify.
func pushText(t *testing.T, c *testCA, text, rego string) []bundle.Key {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"grants.yaml": text, "own.rego": rego} {
		if content == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unsigned, err := bundle.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.PushPolicy(t.Context(), &capb.PushPolicyRequest{Bundle: unsigned}); err != nil {
		t.Fatal(err)
	}
	head, err := c.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var keys []bundle.Key
	for _, k := range head.GetPolicyBundle().GetKeys() {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, bundle.Key{KID: k.GetKid(), PublicKey: pub.(*ecdsa.PublicKey)})
	}
	return keys
}

// shareOf is what client gets, and its entity tag.
func shareOf(t *testing.T, c *testCA, client *http.Client, keys []bundle.Key) (ids, audience []string, etag string) {
	t.Helper()
	raw, etag, err := bundle.Fetch(t.Context(), client, c.url("/v1/policy/bundles/main"), "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := bundle.Verify(raw, keys, bundle.Expect{Name: "main", TrustDomain: "shop.test"})
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range got.Grants {
		ids = append(ids, g.ID)
	}
	return ids, got.Metadata.Audience, etag
}

func TestAgentsGetTheGrantsOfTheirNodes(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c) // n1 has console and web
	second := c.agent("n2")
	n2 := httpClient(t, second.key, second.chain)
	c.entry("n1", "orders")
	c.entry("n2", "stock")
	keys := pushText(t, c, forEverybody, "")
	want := func(what string, client *http.Client, grants, audience []string) (etag string) {
		t.Helper()
		ids, got, etag := shareOf(t, c, client, keys)
		if !slices.Equal(ids, grants) || !slices.Equal(got, audience) {
			t.Errorf("%s: grants %q for %q; want %q for %q", what, ids, got, grants, audience)
		}
		return etag
	}
	const td = "spiffe://shop.test/"
	all := []string{"below-ns", "to-all", "to-orders", "to-stock"}
	first := want("n1", who["agent"], []string{"to-all", "to-orders"}, []string{td + "agent/n1", td + "console", td + "orders", td + "web"})
	want("n2", n2, []string{"to-all", "to-stock"}, []string{td + "agent/n2", td + "stock"})
	want("an administrator", who["admin"], all, nil)
	token := readerToken(t, c, "main", 0)
	if code, header, _ := do(t, who["anonymous"], "GET", c.url("/v1/policy/bundles/main"), token, nil); code != 200 || header.Get("ETag") == first {
		t.Errorf("the holder of a token: %d with the share of an agent", code)
	}

	// The tag is that of the share: it changes with what concerns the node, and only then.
	if code, _, _ := do(t, who["agent"], "GET", c.url("/v1/policy/bundles/main"), http.Header{"If-None-Match": {first}}, nil); code != 304 {
		t.Errorf("again with its tag: %d", code)
	}
	e := c.entry("n1", "ns/x/stock")
	if etag := want("n1 with another service", who["agent"], []string{"below-ns", "to-all", "to-orders"}, []string{td + "agent/n1", td + "console", td + "ns/x/stock", td + "orders", td + "web"}); etag == first {
		t.Error("another share has the same tag")
	}
	want("n2, whom it does not concern", n2, []string{"to-all", "to-stock"}, []string{td + "agent/n2", td + "stock"})
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: e.GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	if etag := want("n1 without it", who["agent"], []string{"to-all", "to-orders"}, []string{td + "agent/n1", td + "console", td + "orders", td + "web"}); etag != first {
		t.Errorf("the same share has the tags %s and %s", first, etag)
	}

	// Rego that reads the grants gets all of them.
	keys = pushText(t, c, forEverybody, "package authz\n\ndeny if count(data.merlon.grants) > 99\n")
	want("n2 with Rego over grants", n2, all, []string{td + "agent/n2", td + "stock"})
}

// Who can write the store alone gets nothing signed.
func TestShareOfABundleThatIsNotOursIsNotServed(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	pushText(t, c, forEverybody, "")
	c.stop()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := bundle.Sign(policyBundle(t), bundle.Metadata{Name: "main", TrustDomain: "shop.test", Generation: 1, IssuedAt: time.Now()}, "foreign", key)
	if err != nil {
		t.Fatal(err)
	}
	var head map[string]any
	if err := json.Unmarshal(value(t, dir, "policy/head/main"), &head); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(foreign)
	head["sha256"], head["size_bytes"], head["chunks"] = hex.EncodeToString(sum[:]), len(foreign), 1
	changed, err := json.Marshal(head)
	if err != nil {
		t.Fatal(err)
	}
	edit(t, dir, store.Put("policy/head/main", changed), store.Put(fmt.Sprintf("policy/blob/%s/0000", head["blob"]), foreign))
	c = startCA(t, dir)
	if code, _, body := do(t, httpClient(t, a.key, a.chain), "GET", c.url("/v1/policy/bundles/main"), nil, nil); code != 503 {
		t.Errorf("%d %q; want 503", code, body)
	}
}

// Tokens of Kubernetes as evidence, by the keys of the issuer and by TokenReview:
// both ways take the same tokens and refuse the others.

package attest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"merlon.dev/ca/internal/oidc"
	"merlon.dev/integration/k8sapi"
	"merlon.dev/integration/oidcprovider"
)

// clusters are attestors of one cluster, by each way.
func clusters(t testing.TB, api *k8sapi.Cluster) map[string]*Cluster {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(api.Certificate())
	dir := t.TempDir()
	source := func(i oidc.Issuer) TokenVerifier {
		i.URL, i.Audience, i.Roots = api.URL, k8sapi.Audience, roots
		return JWKS{oidc.NewSource(i, slog.New(slog.DiscardHandler))}
	}
	all := map[string]*Cluster{}
	for way, tokens := range map[string]TokenVerifier{
		"discovery": source(oidc.Issuer{}),
		"URL":       source(oidc.Issuer{KeysURL: api.URL + k8sapi.KeysPath}),
		"file":      source(oidc.Issuer{KeysFile: api.KeysFile(dir)}),
		"review":    NewTokenReview(api.URL+"/", k8sapi.Audience, api.Reviewer(dir, "reviewer-1"), oidc.HTTPClient(roots), slog.New(slog.DiscardHandler)),
	} {
		all[way] = &Cluster{TrustDomain: td, Name: "prod", Accounts: []string{"other:agent", k8sapi.Namespace + ":" + k8sapi.Account}, Tokens: tokens}
	}
	return all
}

func TestTokenOfAPodProvesItsNode(t *testing.T) {
	api := k8sapi.Start(t)
	for way, c := range clusters(t, api) {
		n, err := c.Prove(t.Context(), api.Sign(api.Claims("worker-1", time.Now())), time.Now())
		if err != nil {
			t.Errorf("%s: %v", way, err)
			continue
		}
		if want := "spiffe://shop.test/agent/k8s/prod/" + k8sapi.NodeUID("worker-1"); n.ID.String() != want || n.Kind != K8s {
			t.Errorf("%s: the node is %s by %s; want %s by k8s", way, n.ID, n.Kind, want)
		}
		var facts []string
		for _, sel := range n.Selectors {
			facts = append(facts, sel.String())
		}
		if want := []string{
			"k8s:cluster:prod", "k8s:node-name:worker-1", "k8s:node-uid:" + k8sapi.NodeUID("worker-1"),
			"k8s:namespace:merlon-system", "k8s:service-account:merlon-agent", "k8s:pod-name:merlon-agent-worker-1", "k8s:pod-uid:0b1f3a52-90de-4a3a-9d8e-0123456789ab",
		}; !slices.Equal(facts, want) {
			t.Errorf("%s: selectors = %q; want %q", way, facts, want)
		}
	}
}

func TestTokensThatProveNoNode(t *testing.T) {
	api, stranger := k8sapi.Start(t), k8sapi.Start(t)
	now := time.Now()
	good := api.Claims("worker-1", now)
	with := func(name string, value any) string {
		changed := maps.Clone(good)
		if changed[name] = value; value == nil {
			delete(changed, name)
		}
		return api.Sign(changed)
	}
	otherKey := oidcprovider.ECKey(t, api.EC.Curve)
	for name, tc := range map[string]struct {
		token string
		want  Reason
	}{
		"none":               {"", Malformed},
		"too long":           {strings.Repeat("x", maxK8sToken+1), Malformed},
		"no token":           {"x.y", Untrusted},
		"with a line break":  {api.Sign(good) + "\n", Malformed},
		"of another cluster": {oidcprovider.Sign(t, jose.ES256, otherKey, oidcprovider.ECKeyID, []byte(`{}`), nil), Untrusted},
		"expired":            {with("exp", now.Add(-time.Minute).Unix()), Untrusted},
		"for somebody else":  {with("aud", []string{"vault"}), Untrusted},
		"legacy, without audience and end": {func() string {
			legacy := maps.Clone(good)
			delete(legacy, "exp")
			delete(legacy, "aud")
			legacy["iss"] = "kubernetes/serviceaccount"
			return api.Sign(legacy)
		}(), Untrusted},
		"of a user":       {with("sub", "system:node:worker-1"), Untrusted},
		"bound to no pod": {api.Sign(k8sapi.Without(good, "pod")), NotProved},
		"without a node":  {api.Sign(k8sapi.Without(good, "node")), NotProved},
	} {
		for way, c := range clusters(t, api) {
			n, err := c.Prove(t.Context(), tc.token, now)
			wantRefusal(t, name+" by "+way, n, err, tc.want)
		}
	}
	// What only who reads the token itself can see.
	for way, c := range clusters(t, api) {
		if way == "review" {
			continue
		}
		for name, token := range map[string]string{
			"without an end":          with("exp", nil),
			"without an audience":     with("aud", nil),
			"for somebody else too":   with("aud", []string{k8sapi.Audience, "vault"}),
			"of another issuer":       with("iss", stranger.URL),
			"whose account disagrees": with("sub", "system:serviceaccount:kube-system:admin"),
			"with HS256 by its key":   oidcprovider.Sign(t, jose.HS256, []byte("0123456789abcdef0123456789abcdef"), oidcprovider.RSAKeyID, []byte(`{}`), nil),
		} {
			n, err := c.Prove(t.Context(), token, now)
			wantRefusal(t, name+" by "+way, n, err, Untrusted)
		}
	}
	for way, c := range clusters(t, api) {
		c.Accounts = []string{k8sapi.Namespace + ":other", "other:" + k8sapi.Account}
		n, err := c.Prove(t.Context(), api.Sign(good), now)
		wantRefusal(t, "an account that is not listed by "+way, n, err, NotAllowed)
		c.Accounts = nil
		n, err = c.Prove(t.Context(), api.Sign(good), now)
		wantRefusal(t, "no account listed by "+way, n, err, NotAllowed)
	}
}

// A key that is not known yet is asked for, and not for each token that names one.
func TestKeysOfAClusterRotate(t *testing.T) {
	api := k8sapi.Start(t)
	for way, c := range clusters(t, api) {
		if way == "file" || way == "review" {
			continue
		}
		now := time.Now()
		if _, err := c.Prove(t.Context(), api.Sign(api.Claims("w", now)), now); err != nil {
			t.Fatalf("%s: %v", way, err)
		}
		api.Rotate()
		asked := api.Asked(k8sapi.KeysPath)
		later := now.Add(time.Minute)
		if _, err := c.Prove(t.Context(), api.Sign(api.Claims("w", now)), later); err != nil {
			t.Errorf("%s: after the rotation: %v", way, err)
		}
		unknown := oidcprovider.Sign(t, jose.RS256, api.RSA, "nobody's", []byte(`{}`), nil)
		for range 20 {
			n, err := c.Prove(t.Context(), unknown, later)
			wantRefusal(t, "a kid that nobody has", n, err, Untrusted)
		}
		if n := api.Asked(k8sapi.KeysPath) - asked; n != 1 {
			t.Errorf("%s: the keys were asked for %d times; want once", way, n)
		}
	}
}

func TestKeysInAFileAreReadAgain(t *testing.T) {
	api := k8sapi.Start(t)
	dir := t.TempDir()
	c := &Cluster{TrustDomain: td, Name: "prod", Accounts: []string{k8sapi.Namespace + ":" + k8sapi.Account}, Tokens: JWKS{oidc.NewSource(oidc.Issuer{
		URL: api.URL, Audience: k8sapi.Audience, KeysFile: api.KeysFile(dir),
	}, slog.New(slog.DiscardHandler))}}
	now := time.Now()
	prove := func(at time.Time) error {
		_, err := c.Prove(t.Context(), api.Sign(api.Claims("w", now)), at)
		return err
	}
	if err := prove(now); err != nil {
		t.Fatal(err)
	}
	api.Rotate()
	api.KeysFile(dir)
	if err := prove(now.Add(time.Minute)); err != nil {
		t.Errorf("after the file was replaced: %v", err)
	}
	for name, content := range map[string]string{"empty": "", "no JSON": "x", "no keys": `{"keys":[]}`, "large": strings.Repeat(" ", 300<<10)} {
		path := filepath.Join(t.TempDir(), "jwks.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		c.Tokens = JWKS{oidc.NewSource(oidc.Issuer{URL: api.URL, Audience: k8sapi.Audience, KeysFile: path}, slog.New(slog.DiscardHandler))}
		n, err := c.Prove(t.Context(), api.Sign(api.Claims("w", now)), now)
		wantRefusal(t, name, n, err, Unavailable)
	}
}

func TestAPIServerThatCannotBeAskedRefusesNobodyForGood(t *testing.T) {
	api := k8sapi.Start(t)
	c := clusters(t, api)["review"]
	token := api.Sign(api.Claims("w", time.Now()))
	answers := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			fmt.Fprint(w, body)
		}
	}
	review := func(instead http.HandlerFunc) (*Node, error) {
		api.Change(func(a *oidcprovider.Answers) { a.Instead[k8sapi.ReviewPath] = instead })
		return c.Prove(t.Context(), token, time.Now())
	}
	for name, instead := range map[string]http.HandlerFunc{
		"forbidden": answers(403, "{}"), "an error": answers(500, ""), "no JSON": answers(201, "x"), "another object": answers(201, `{"kind":"Status"}`),
		"too much": answers(201, `{"kind":"TokenReview"`+strings.Repeat(" ", maxReviewAnswer)+`}`),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		},
	} {
		n, err := review(instead)
		wantRefusal(t, name, n, err, Unavailable)
	}
	const user = `"user":{"username":"system:serviceaccount:merlon-system:merlon-agent","extra":{"authentication.kubernetes.io/pod-name":["p"],"authentication.kubernetes.io/pod-uid":["0b1f3a52-90de-4a3a-9d8e-0123456789ab"],"authentication.kubernetes.io/node-name":["n"],"authentication.kubernetes.io/node-uid":["0b1f3a52-90de-4a3a-9d8e-0123456789ab"]}}`
	says := func(status string) http.HandlerFunc {
		return answers(201, `{"kind":"TokenReview","status":{`+status+`}}`)
	}
	if n, err := review(says(`"authenticated":true,"audiences":["merlon"],` + user)); err != nil {
		t.Errorf("a good answer: %v, %v", n, err)
	}
	for name, status := range map[string]string{
		"an older server, which knows no audiences": `"authenticated":true,` + user,
		"another audience":                          `"authenticated":true,"audiences":["vault"],` + user,
		"not authenticated":                         `"audiences":["merlon"],` + user,
		"nothing":                                   ``,
	} {
		n, err := review(says(status))
		wantRefusal(t, name, n, err, Untrusted)
	}
	n, err := review(says(`"authenticated":true,"audiences":["merlon"],` + strings.Replace(user, `["n"]`, `["n","m"]`, 1)))
	wantRefusal(t, "two nodes", n, err, NotProved)
}

func TestReviewersTokenIsReadAgainAndReviewsAreBounded(t *testing.T) {
	api := k8sapi.Start(t)
	dir := t.TempDir()
	roots := x509.NewCertPool()
	roots.AddCert(api.Certificate())
	r := NewTokenReview(api.URL, k8sapi.Audience, api.Reviewer(dir, "one"), oidc.HTTPClient(roots), slog.New(slog.DiscardHandler))
	token := api.Sign(api.Claims("w", time.Now()))
	api.Reviewer(dir, "two")
	if _, err := r.Pod(t.Context(), token, time.Now()); err != nil {
		t.Errorf("with the new token of the CA: %v", err)
	}
	asked := api.Asked(k8sapi.ReviewPath)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // so that nothing is waited for
	var last error
	for range 2 * reviewsBurst {
		_, last = r.Pod(ctx, token, time.Now())
	}
	if !errors.Is(last, ErrCannotVerify) || !strings.Contains(last.Error(), "too often") {
		t.Errorf("after %d reviews at once: %v; want that it is too often", 2*reviewsBurst, last)
	}
	if n := api.Asked(k8sapi.ReviewPath) - asked; n > reviewsBurst+reviewsPerSecond {
		t.Errorf("the API server was asked %d times at once", n)
	}
}

// Whatever arrives: only a token that the cluster signed proves a node.
func FuzzK8sToken(f *testing.F) {
	api := k8sapi.Start(f)
	now := time.Now()
	good := api.Sign(api.Claims("w", now))
	f.Add(good)
	f.Add("a.b.c")
	f.Add(strings.Replace(good, ".", ".e30.", 1))
	c := clusters(f, api)["file"]
	f.Fuzz(func(t *testing.T, token string) {
		n, err := c.Prove(context.Background(), token, now)
		if (n == nil) == (err == nil) {
			t.Fatalf("proved %v, error %v", n, err)
		}
		if err == nil && strings.Split(token, ".")[1] != strings.Split(good, ".")[1] {
			t.Fatalf("%q proved %s", token, n.ID)
		}
	})
}

// The answer comes from the API server; all the same it takes nobody by surprise.
func FuzzTokenReviewAnswer(f *testing.F) {
	f.Add(`{"kind":"TokenReview","status":{"authenticated":true,"audiences":["merlon"],"user":{"username":"system:serviceaccount:a:b","extra":{}}}}`)
	f.Add(`{"kind":"TokenReview","status":{"user":{"username":"system:serviceaccount:a:b:c"}}}`)
	r := NewTokenReview("https://api", "merlon", "", nil, slog.New(slog.DiscardHandler))
	f.Fuzz(func(t *testing.T, body string) {
		answer, err := readReview(strings.NewReader(body))
		if err != nil {
			return
		}
		pod, err := r.judge(answer.Status)
		if err == nil && (!answer.Status.Authenticated || pod.Namespace == "" || pod.Account == "" || strings.Contains(pod.Account, ":")) {
			t.Fatalf("%s is taken for %+v", body, pod)
		}
	})
}

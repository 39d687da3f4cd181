// Package k8sapi is, for tests, the part of a Kubernetes API server that has to do
// with service-account tokens, over real TLS on loopback: it projects tokens as
// the real one writes them, serves the keys of their issuer, and reviews tokens
// by really verifying them.
package k8sapi

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"merlon.dev/integration/oidcprovider"
)

// The paths that it answers, and the audience and namespace of its tokens.
const (
	KeysPath   = "/openid/v1/jwks"
	ReviewPath = "/apis/authentication.k8s.io/v1/tokenreviews"
	Audience   = "merlon"
	Namespace  = "merlon-system"
	Account    = "merlon-agent"
)

// Cluster is a running API server.
type Cluster struct {
	*oidcprovider.Provider
	tb testing.TB

	mu sync.Mutex
	// guarded by mu
	kid      string
	reviewer string // the token that may ask for reviews
	rotated  int
}

// Start runs an API server until the test ends.
func Start(tb testing.TB) *Cluster {
	tb.Helper()
	c := &Cluster{Provider: oidcprovider.Start(tb), tb: tb, kid: oidcprovider.RSAKeyID, reviewer: "reviewer-1"}
	c.Change(func(a *oidcprovider.Answers) {
		a.Document["jwks_uri"] = c.URL + KeysPath
		a.Instead[KeysPath] = c.serveKeys(a.Keys)
		a.Instead[ReviewPath] = c.review
	})
	return c
}

// serveKeys answers as the real one does, whose only type for keys is this.
func (c *Cluster) serveKeys(keys []jose.JSONWebKey) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		const own = "application/jwk-set+json"
		if accept := r.Header.Get("Accept"); accept != "" && !strings.Contains(accept, own) && !strings.Contains(accept, "*/*") {
			w.WriteHeader(http.StatusNotAcceptable)
			return
		}
		w.Header().Set("Content-Type", own)
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: keys})
	}
}

// Rotate makes another key sign, and forgets the one before.
func (c *Cluster) Rotate() {
	c.tb.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rotated++
	c.kid = fmt.Sprintf("rotated-%d", c.rotated)
	keys := []jose.JSONWebKey{{Key: c.RSA.Public(), KeyID: c.kid, Algorithm: "RS256", Use: "sig"}}
	c.Change(func(a *oidcprovider.Answers) {
		a.Keys = keys
		a.Instead[KeysPath] = c.serveKeys(keys)
	})
}

// Claims are those of a good token for the agent's pod on a node.
func (c *Cluster) Claims(node string, now time.Time) map[string]any {
	return map[string]any{
		"iss": c.URL, "aud": []string{Audience}, "jti": "6d4cbb1d-3c1e-4c5f-8a39-0c6c7f3f6a6e",
		"sub": "system:serviceaccount:" + Namespace + ":" + Account,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": Namespace,
			"node":      map[string]any{"name": node, "uid": NodeUID(node)},
			"pod":       map[string]any{"name": "merlon-agent-" + node, "uid": "0b1f3a52-90de-4a3a-9d8e-0123456789ab"},
			"serviceaccount": map[string]any{
				"name": Account, "uid": "5a0f2a7b-7f3f-4b7e-8f59-0123456789ab",
			},
			"warnafter": now.Add(50 * time.Minute).Unix(),
		},
	}
}

// NodeUID is the UID that a node has here.
func NodeUID(node string) string { return fmt.Sprintf("c0ffee00-0000-4000-8000-%012x", len(node)) }

// Sign makes a token of claims, without a typ, as the real ones are.
func (c *Cluster) Sign(claims map[string]any) string {
	c.tb.Helper()
	c.mu.Lock()
	kid := c.kid
	c.mu.Unlock()
	payload, err := json.Marshal(claims)
	if err != nil {
		c.tb.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: c.RSA}, (&jose.SignerOptions{}).WithHeader("kid", kid))
	if err != nil {
		c.tb.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		c.tb.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		c.tb.Fatal(err)
	}
	return token
}

// Project writes a token for the agent's pod on a node into a file in dir.
func (c *Cluster) Project(dir, node string) string {
	c.tb.Helper()
	return c.write(filepath.Join(dir, "token"), c.Sign(c.Claims(node, time.Now())))
}

// Reviewer makes token the one that may ask for reviews, and writes it to a file
// in dir.
func (c *Cluster) Reviewer(dir, token string) string {
	c.tb.Helper()
	c.mu.Lock()
	c.reviewer = token
	c.mu.Unlock()
	return c.write(filepath.Join(dir, "reviewer"), token+"\n")
}

// CAFile writes the certificate of its TLS to a file in dir.
func (c *Cluster) CAFile(dir string) string {
	c.tb.Helper()
	return c.write(filepath.Join(dir, "k8s-ca.pem"), string(c.CertificatePEM()))
}

// KeysFile writes the keys of the issuer to a file in dir.
func (c *Cluster) KeysFile(dir string) string {
	c.tb.Helper()
	var keys []jose.JSONWebKey
	c.Change(func(a *oidcprovider.Answers) { keys = a.Keys })
	text, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		c.tb.Fatal(err)
	}
	return c.write(filepath.Join(dir, "jwks.json"), string(text))
}

// write replaces a file in one step, as kubelet does.
func (c *Cluster) write(path, text string) string {
	c.tb.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		c.tb.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		c.tb.Fatal(err)
	}
	return path
}

type review struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Spec       map[string]any `json:"spec"`
	Status     map[string]any `json:"status"`
}

// review answers a TokenReview.
func (c *Cluster) review(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	reviewer := c.reviewer
	c.mu.Unlock()
	if r.Method != http.MethodPost || r.Header.Get("Authorization") != "Bearer "+reviewer {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var asked review
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || asked.Kind != "TokenReview" {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	token, _ := asked.Spec["token"].(string)
	audiences, _ := asked.Spec["audiences"].([]any)
	asked.Status = map[string]any{"authenticated": false, "error": "invalid bearer token"}
	if status := c.verified(token, audiences); status != nil {
		asked.Status = status
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(asked)
}

// verified is what is said of a good token, nil for any other.
func (c *Cluster) verified(token string, wanted []any) map[string]any {
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return nil
	}
	payload, err := jws.Verify(c.RSA.Public())
	if err != nil {
		return nil
	}
	var claims struct {
		Aud []string `json:"aud"`
		Exp int64    `json:"exp"`
		Sub string   `json:"sub"`
		K8s struct {
			Pod, Node struct{ Name, UID string }
		} `json:"kubernetes.io"`
	}
	if json.Unmarshal(payload, &claims) != nil || claims.Exp <= time.Now().Unix() {
		return nil
	}
	var both []string
	for _, aud := range wanted {
		if text, ok := aud.(string); ok && slices.Contains(claims.Aud, text) {
			both = append(both, text)
		}
	}
	if len(both) == 0 {
		return nil
	}
	extra := map[string][]string{}
	for key, value := range map[string]string{
		"pod-name": claims.K8s.Pod.Name, "pod-uid": claims.K8s.Pod.UID, "node-name": claims.K8s.Node.Name, "node-uid": claims.K8s.Node.UID,
	} {
		if value != "" {
			extra["authentication.kubernetes.io/"+key] = []string{value}
		}
	}
	return map[string]any{
		"authenticated": true, "audiences": both,
		"user": map[string]any{"username": claims.Sub, "groups": []string{"system:serviceaccounts"}, "extra": extra},
	}
}

// Without is claims without what path names, below "kubernetes.io".
func Without(claims map[string]any, name string) map[string]any {
	inner := maps.Clone(claims["kubernetes.io"].(map[string]any))
	delete(inner, name)
	changed := maps.Clone(claims)
	changed["kubernetes.io"] = inner
	return changed
}

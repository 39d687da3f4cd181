// A CA of several replicas from outside: what a workload sees when one of them
// or a member of etcd is lost.

package integration_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/integration/stage"
)

// renewals counts messages on a stream until n SVIDs with new serial numbers
// have come: the SVIDs go on being renewed and the stream lives.
func (s *svidStream) renewals(t *testing.T, n int) {
	t.Helper()
	timeout := time.After(60 * time.Second)
	for seen := make(map[string]bool); len(seen) < n; {
		select {
		case resp := <-s.got:
			for _, svid := range resp.GetSvids() {
				seen[string(svid.GetX509Svid())] = true
			}
		case err := <-s.err:
			t.Fatalf("the stream ended: %v", err)
		case <-timeout:
			t.Fatalf("only %d of %d SVIDs came within a minute", len(seen), n)
		}
	}
}

func TestLossOfAReplicaOrAMemberIsInvisibleToWorkloads(t *testing.T) {
	t.Parallel() // it waits more than it works
	c := stage.StartCluster(t, 3, 2)
	c.Join()
	c.Entry("/me", "--ttl", "6s")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	stream := watchSVIDs(t, c.Domain)
	stream.expect(t, c.ID("/me"))

	lost := c.Serving()
	lost.Kill()
	left := c.By(c.Other(lost))
	left.Entry("/after-replica")
	stream.expect(t, c.ID("/after-replica"))
	stream.renewals(t, 4)

	lost.Restart()
	stage.Eventually(t, "the lost replica is back", lost.Ready)
	if got, want := c.By(lost).Merlon("entry", "list", "-o", "json"), left.Merlon("entry", "list", "-o", "json"); got != want {
		t.Errorf("entries on the replica that was lost = %s; want %s", got, want)
	}

	c.Etcd.Leader().Kill()
	for i, r := range c.Replicas {
		d, path := c.By(r), fmt.Sprintf("/after-member-%d", i)
		stage.Eventually(t, "writes go on with two of three members", func() error {
			_, stderr, err := d.Try("entry", "create", "--spiffe-id", d.ID(path), "--selector", "unix:uid:0", "--parent", c.AgentID())
			if err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
		stream.expect(t, d.ID(path))
	}
	stream.renewals(t, 4)
}

func TestReplicasIssueUnderOneRootWithKeysOfTheirOwn(t *testing.T) {
	t.Parallel() // it waits more than it works
	c := stage.StartCluster(t, 1, 2, "trust_refresh_hint: 1s")
	c.Join()
	c.Entry("/me", "--ttl", "4s")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	stage.Eventually(t, "both JWT keys sign", func() error { _, err := stage.AuthorityIn(c.Domain, "jwt", "published"); return opposite(err) })
	issuers, kids := make(map[string]bool), make(map[string]bool)
	for range 2 {
		serving := c.Serving()
		svid, err := fetch(t, c.Domain)
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := workloadapi.FetchX509Bundles(t.Context(), workloadapi.WithAddr(c.WorkloadAPI))
		if err != nil {
			t.Fatal(err)
		}
		if n := len(bundle.Bundles()[0].X509Authorities()); n != 1 {
			t.Errorf("%d roots in the trust bundle; want 1", n)
		}
		issuers[string(svid.Certificates[0].AuthorityKeyId)] = true
		token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: fmt.Sprintf("orders-%s", serving.ID)}, workloadapi.WithAddr(c.WorkloadAPI))
		if err != nil {
			t.Fatalf("JWT-SVID through %s: %v", serving.ID, err)
		}
		keys, err := workloadapi.FetchJWTBundles(t.Context(), workloadapi.WithAddr(c.WorkloadAPI))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := jwtsvid.ParseAndValidate(token.Marshal(), keys, []string{"orders-" + serving.ID}); err != nil {
			t.Errorf("JWT-SVID by %s: %v", serving.ID, err)
		}
		kids[strings.SplitN(token.Marshal(), ".", 2)[0]] = true
		checkWhoseLog(t, c, serving, svid.Certificates[0], token.Marshal())

		serving.Kill()
		last := svid.Certificates[0].AuthorityKeyId
		stage.Eventually(t, "the other replica renews", func() error {
			next, err := fetch(t, c.Domain)
			if err != nil {
				return err
			}
			if string(next.Certificates[0].AuthorityKeyId) == string(last) {
				return errors.New("still the SVID of the replica that is gone")
			}
			return nil
		})
		serving.Restart()
		stage.Eventually(t, "it is back", serving.Ready)
	}
	if len(issuers) != 2 || len(kids) != 2 {
		t.Errorf("%d intermediates and %d JWT keys were used; want 2 and 2", len(issuers), len(kids))
	}
}

// opposite is for what is to be gone.
func opposite(err error) error {
	if err == nil {
		return errors.New("it is there still")
	}
	return nil
}

// The JWT key of a replica that has joined waits until everybody knows it.
// Workloads do not notice: their agent asks another replica.
func TestReplicaThatJoinsSignsNoJWTBeforeItsKeyIsKnown(t *testing.T) {
	t.Parallel() // it waits more than it works
	c := stage.StartCluster(t, 1, 2)
	c.Join()
	c.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	first, second := c.Replicas[0], c.Replicas[1]
	if c.Serving() == first { // the agent goes to the other, and stays there
		first.Kill()
		if c.Serving() != second {
			t.Fatal("the agent does not follow the second replica")
		}
		first.Restart()
		stage.Eventually(t, "the first is back", first.Ready)
	}
	key, err := stage.AuthorityIn(c.Domain, "jwt", "published")
	if err != nil || key.Pending == nil || key.Pending.Ready {
		t.Fatalf("the second replica's JWT key = %+v, %v; want it to wait", key, err)
	}
	token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "orders"}, workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil {
		t.Fatalf("JWT-SVID through the replica that has joined: %v", err)
	}
	keys, err := workloadapi.FetchJWTBundles(t.Context(), workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(token.Marshal(), keys, []string{"orders"}); err != nil {
		t.Error(err)
	}
	if kid := kidOf(t, token.Marshal()); kid == key.ID {
		t.Errorf("%s has signed, which is published", kid)
	}
	// With nobody else to ask, the agent's log has the reason.
	first.Kill()
	_, err = workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "payments"}, workloadapi.WithAddr(c.WorkloadAPI))
	if status.Code(err) != codes.Unavailable || !strings.Contains(c.Agent.Log(), "signs once every agent has acknowledged it") {
		t.Errorf("JWT-SVID without another replica: %v; want UNAVAILABLE, and why in the log", err)
	}
	c.By(second).Merlon("authority", "activate", key.ID, "--force")
	token, err = workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "payments"}, workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil || kidOf(t, token.Marshal()) != key.ID {
		t.Errorf("JWT-SVID after the activation: %v, %v; want one by %s", token, err, key.ID)
	}
}

// kidOf is the key that a token says has signed it.
func kidOf(t *testing.T, token string) string {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.SplitN(token, ".", 2)[0])
	if err != nil {
		t.Fatal(err)
	}
	var header struct{ Kid string }
	stage.Decode(t, string(raw), &header)
	return header.Kid
}

// checkWhoseLog: what a replica issued is in its log, and the log of another one
// says whose it is.
func checkWhoseLog(t *testing.T, c *stage.Cluster, by *stage.Replica, cert *x509.Certificate, token string) {
	t.Helper()
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid.jwt")}
	for i, content := range [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), []byte(token)} {
		if err := os.WriteFile(files[i], content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	type verdict struct{ Result, Replica string }
	var own []verdict
	stage.Decode(t, c.By(by).Merlon("log", "audit", files[0], files[1], "-o", "json"), &own)
	if len(own) != 2 || own[0].Result != "logged" || own[1].Result != "logged" {
		t.Errorf("the log of %s says %v of what it issued", by.ID, own)
	}
	stdout, _, err := c.By(c.Other(by)).Try("log", "audit", files[0], "-o", "json")
	if err == nil {
		t.Error("another replica's log is taken for the one that is meant")
	}
	var other []verdict
	stage.Decode(t, stdout, &other)
	if len(other) != 1 || other[0].Result != "elsewhere" || other[0].Replica != own[0].Replica {
		t.Errorf("the log of another replica says %v; want elsewhere, and %s", other, own[0].Replica)
	}
}

// A policy that was pushed to one replica is verified by agents that are
// connected to the other: its key is announced by both.
func TestPolicyPushedToOneReplicaIsActiveThroughTheOther(t *testing.T) {
	c := stage.StartCluster(t, 1, 2)
	c.Join()
	serving := c.Serving()
	for generation, r := range c.Replicas {
		c.By(r).Merlon("policy", "push", "../examples/quickstart/policy", "--wait", "0s")
		stage.Eventually(t, "the agent has the policy of "+r.ID, func() error {
			stdout := c.By(serving).Merlon("agent", "list", "-o", "json")
			if want := fmt.Sprintf(`"policy_generation": %d`, generation+1); !strings.Contains(stdout, want) {
				return fmt.Errorf("%s; want %s", stdout, want)
			}
			return nil
		})
	}
}

// The agent joined the first replica: one whose own SVID came from the evicted
// one would need a new token.
func TestEvictedReplicaServesNobody(t *testing.T) {
	c := stage.StartCluster(t, 1, 1)
	c.Join()
	files, public := stage.Certify(t, t.TempDir(), "127.0.0.1"), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	second := c.Add(c.Etcd.Endpoints(), fmt.Sprintf("bundle_endpoint: {address: '%s', cert_file: '%s', key_file: '%s'}", public, files.Cert, files.Key))
	roots := stage.Roots(t, files.CA)
	if code, text := readBundle(t, public, roots); code != http.StatusOK || sequenceOf(t, text) != sequenceOf(t, []byte(c.Merlon("trust", "show", "-o", "jwks"))) {
		t.Errorf("the trust bundle at the second replica: %d, %s", code, text)
	}
	// A change is there at once at each, whichever it was made at (F-11).
	c.Merlon("authority", "prepare", "--kind", "jwt")
	stage.Eventually(t, "the new key is published", func() error { _, err := stage.AuthorityIn(c.Domain, "jwt", "published"); return err })
	shown := sequenceOf(t, []byte(c.Merlon("trust", "show", "-o", "jwks")))
	stage.Eventually(t, "the second replica has it", func() error {
		if _, text := readBundle(t, public, roots); sequenceOf(t, text) < shown {
			return fmt.Errorf("sequence %d of %d", sequenceOf(t, text), shown)
		}
		return nil
	})
	c.Entry("/me", "--ttl", "1h")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, c.Domain); return err })
	c.Merlon("replica", "evict", second.ID)
	stage.Eventually(t, "the evicted replica is not ready", func() error {
		if second.Ready() == nil {
			return errors.New("it is")
		}
		return nil
	})
	// Nobody is told an old trust bundle by it (F-11).
	if code, text := readBundle(t, public, roots); code != http.StatusServiceUnavailable || bytes.Contains(text, []byte("keys")) {
		t.Errorf("the bundle endpoint of an evicted replica: %d, %s", code, text)
	}
	if list := c.Merlon("replica", "list"); strings.Contains(list, second.ID) {
		t.Errorf("replicas after the eviction = %s", list)
	}
	if _, err := fetch(t, c.Domain); err != nil {
		t.Errorf("after the eviction of another replica: %v", err)
	}
}

// readBundle reads a bundle endpoint of profile https_web.
func readBundle(t *testing.T, address string, roots *x509.CertPool) (code int, body []byte) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	res, err := client.Get("https://" + address + "/v1/trust/bundle")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, body
}

func sequenceOf(t *testing.T, bundle []byte) uint64 {
	t.Helper()
	var doc struct {
		Sequence uint64 `json:"spiffe_sequence"`
	}
	if err := json.Unmarshal(bundle, &doc); err != nil {
		t.Fatalf("%v: %s", err, bundle)
	}
	return doc.Sequence
}

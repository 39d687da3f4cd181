// What one partner can do to another, or to the CA that follows both: copy its keys, hang,
// empty its own trust. Over real processes; documents that are refused are in
// follow_test.go.

package federation_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// partnerCA is another trust domain with a https_web endpoint.
type partnerCA struct {
	*forge.Authority
	url, webCA string
	answer     atomic.Pointer[http.HandlerFunc]
}

func startPartner(t *testing.T, name string) *partnerCA {
	t.Helper()
	files := stage.Certify(t, t.TempDir(), "127.0.0.1")
	p := &partnerCA{Authority: forge.New(t, name), webCA: files.CA}
	p.publish(document(t, p.Bundle(), 1))
	p.url = "https://" + serveFiles(t, files, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*p.answer.Load())(w, r) }))
	return p
}

func (p *partnerCA) publish(h http.HandlerFunc) { p.answer.Store(&h) }

func (p *partnerCA) followedBy(d *stage.Domain) {
	d.Merlon("federation", "follow", p.TrustDomain.Name(), "--profile", "https_web", "--url", p.url, "--web-ca", p.webCA)
}

// with is its trust bundle with the keys of another authority of the same trust domain.
func (p *partnerCA) with(next *forge.Authority) *spiffebundle.Bundle {
	b := p.Bundle()
	for _, cert := range next.Bundle().X509Authorities() {
		b.AddX509Authority(cert)
	}
	for kid, key := range next.Bundle().JWTAuthorities() {
		if err := b.AddJWTAuthority(kid, key); err != nil {
			panic(err)
		}
	}
	return b
}

// A partner that puts another's keys into its own trust bundle, of an X.509 authority with
// a certificate of its own making, keeps neither from renewing its keys, whichever is
// polled first; both are named until it ends.
func TestCopiedKeysAreAnAlarmAndStopNobody(t *testing.T) {
	t.Parallel()
	shop := stage.CAAlone(t, "", nil)
	victim, copier := startPartner(t, "victim.test"), startPartner(t, "copier.test")
	victim.followedBy(shop)
	copier.followedBy(shop)
	if _, stderr, err := shop.Try("federation", "status"); err != nil {
		t.Fatalf("two partners: %v, %s", err, stderr)
	}
	for round, order := range [][]*partnerCA{{copier, victim}, {victim, copier}} {
		next := forge.New(t, "victim.test")
		copied := copier.Bundle()
		copied.AddX509Authority(next.CrossSigned(copier.Authority, forge.URIs("spiffe://copier.test")))
		if err := copied.AddJWTAuthority("mine", next.JWTKey.Public()); err != nil {
			t.Fatal(err)
		}
		sequence := uint64(10 * (round + 1))
		copier.publish(document(t, copied, sequence))
		victim.publish(document(t, victim.with(next), sequence))
		for _, p := range order {
			shop.Merlon("federation", "refresh", p.TrustDomain.Name())
		}
		for _, p := range order {
			if h := healthOf(t, shop, p.TrustDomain.Name()); h.In != "ok" || h.Sequence != sequence || len(h.RootHashes) != 2 {
				t.Errorf("round %d: %+v; want its new keys", round, h)
			}
		}
		_, stderr, err := shop.Try("federation", "status")
		for _, name := range []string{"merlon: victim.test: the key of", "the JWT key", "is in the trust bundle of copier.test too", "merlon: copier.test: the key of", "is in the trust bundle of victim.test too"} {
			if codeOf(err) != 3 || !strings.Contains(stderr, name) {
				t.Errorf("round %d: status: %v, %s; want exit code 3, and %q", round, err, stderr, name)
			}
		}
		metrics := get(t, "http://"+shop.Health+"/metrics")
		for _, p := range order {
			if line := fmt.Sprintf("merlon_ca_federation_shared_keys{trust_domain=%q} 2", p.TrustDomain.Name()); !strings.Contains(metrics, line) {
				t.Errorf("round %d: no metric %s", round, line)
			}
		}
		stage.Eventually(t, "the log names both", func() error {
			if log := shop.CA.Log(); strings.Count(log, "vouches for each") < 2*(round+1) {
				return errors.New(log)
			}
			return nil
		})
	}
	shop.Merlon("federation", "remove", "copier.test")
	if _, stderr, err := shop.Try("federation", "status"); err != nil {
		t.Errorf("without the copier: %v, %s", err, stderr)
	}
}

// A partner whose body never ends costs one connection for 20 seconds. Meanwhile another's
// new trust bundle arrives; its own last one stays, and it is named.
func TestPartnerThatHangsDelaysNobody(t *testing.T) {
	t.Parallel()
	shop := stage.CAAlone(t, "", nil)
	slow, good := startPartner(t, "slow.test"), startPartner(t, "good.test")
	slow.followedBy(shop)
	good.followedBy(shop)
	begun, ended := make(chan struct{}, 8), make(chan time.Duration, 8)
	slow.publish(func(w http.ResponseWriter, r *http.Request) {
		at := time.Now()
		begun <- struct{}{}
		for r.Context().Err() == nil { // a byte now and then
			fmt.Fprint(w, " ")
			w.(http.Flusher).Flush()
			time.Sleep(100 * time.Millisecond)
		}
		ended <- time.Since(at)
	})
	select {
	case <-begun: // by itself, a hint after it was followed
	case <-time.After(time.Minute):
		t.Fatal("it is not polled")
	}
	good.publish(document(t, good.with(forge.New(t, "good.test")), 2))
	waitLong(t, "the other's new trust bundle has come by itself", func() error {
		if h := healthOf(t, shop, "good.test"); h.Sequence != 2 {
			return fmt.Errorf("%+v", h)
		}
		return nil
	})
	select {
	case after := <-ended:
		t.Logf("given up after %v, before the other's came", after)
		if after < 15*time.Second { // the other is due every 10 s
			t.Error("the fetch that hangs ended early")
		}
	default:
	}
	waitLong(t, "it is given up, and named", func() error {
		_, stderr, err := shop.Try("federation", "status")
		if codeOf(err) != 3 || !strings.Contains(stderr, "slow.test: their trust bundle cannot be had since") {
			return fmt.Errorf("%w, %s", err, stderr)
		}
		return nil
	})
	if h := healthOf(t, shop, "slow.test"); h.In != "failing" || h.Sequence != 1 || len(h.RootHashes) != 1 {
		t.Errorf("%+v; want the last trust bundle to stay", h)
	}
}

// Emptied, in each form that there is, a trust bundle ends the trust by the next poll, with
// nobody's help: its peers are refused, and those that are connected are cut.
func TestPeersOfAnEmptiedBundleAreCut(t *testing.T) {
	t.Parallel()
	shop, p := stage.Separate(t), startPartner(t, "partner.test")
	shop.Entry("/me", "--federates-with", "partner.test")
	p.followedBy(shop)
	dir := t.TempDir()
	grant := fmt.Sprintf("grants:\n  - id: partner-to-me\n    from: [spiffe://partner.test]\n    to: [%s]\n    http: {}\n", shop.ID("/me"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grant), 0o600); err != nil {
		t.Fatal(err)
	}
	shop.Merlon("policy", "push", dir)
	url := services.Serve(t, services.Open(t, shop), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done() // until the connection is cut
		}
	}))
	leaf := p.Leaf("/web").Certificate()
	caller := &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf}},
	}}
	sequence := uint64(1)
	forms := map[string]string{
		"as go-spiffe writes it": `{"keys":null,"spiffe_sequence":%d,"spiffe_refresh_hint":10}`,
		"an empty list":          `{"keys":[],"spiffe_sequence":%d,"spiffe_refresh_hint":10}`,
		"no key of use":          `{"keys":[{"kty":"EC","use":"sig","kid":"k"}],"spiffe_sequence":%d,"spiffe_refresh_hint":10}`,
	}
	for _, form := range slices.Sorted(maps.Keys(forms)) {
		stage.Eventually(t, form+": the partner is let in", func() error {
			if got := services.Reason(caller, url); got != "200 OK" {
				return errors.New(got)
			}
			return nil
		})
		resp, err := caller.Get(url + "/stream")
		if err != nil {
			t.Fatal(err)
		}
		cut := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, resp.Body)
			cut <- err
		}()
		sequence++
		text, at := fmt.Sprintf(forms[form], sequence), time.Now()
		p.publish(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
		select {
		case err := <-cut:
			if err == nil {
				t.Errorf("%s: the stream ended as if the server had said all", form)
			}
			t.Logf("%s: cut %v after it was published", form, time.Since(at).Round(100*time.Millisecond))
		case <-time.After(2 * time.Minute):
			t.Fatalf("%s: the live connection goes on", form)
		}
		resp.Body.Close()
		if got := services.Reason(caller, url); got == "200 OK" {
			t.Errorf("%s: the partner is let in", form)
		}
		if _, stderr, err := shop.Try("federation", "status"); codeOf(err) != 3 || !strings.Contains(stderr, "nobody of theirs is trusted") {
			t.Errorf("%s: status: %v, %s", form, err, stderr)
		}
		sequence++
		p.publish(document(t, p.Bundle(), sequence))
		shop.Merlon("federation", "refresh", "partner.test")
	}
	if out := shop.Merlon("federation", "show", "partner.test"); strings.Contains(out, "ignored") {
		t.Errorf("what the document before ignored: %s", out)
	}
}

// Whether the other side comes by is judged by when it did last, by the URL that it was
// given first, too, until it comes by a later one; looking without reading is no reading.
func TestReadersAreJudgedByAge(t *testing.T) {
	t.Parallel()
	e := withEndpointAlone(t, "trust_refresh_hint: 10s")
	read := func(method, url string) {
		t.Helper()
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: stage.Roots(t, e.files.CA)}}}
		req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s %s: %s", method, url, resp.Status)
		}
	}
	isOutAt := func(td, state string) {
		t.Helper()
		waitLong(t, "ours is "+state, func() error {
			if h := healthOf(t, e.Domain, td); h.Out != state {
				return fmt.Errorf("%+v", h)
			}
			return nil
		})
	}
	isOut := func(state string) { t.Helper(); isOutAt("partner.test", state) }
	first := e.invite(t, "partner.test")
	read(http.MethodHead, first)
	read(http.MethodGet, e.invite(t, "other.test"))
	isOutAt("other.test", "ok") // what was seen before has been written down, too
	if h := healthOf(t, e.Domain, "partner.test"); h.Out != "never" {
		t.Errorf("before it was read: %+v", h)
	}
	e.Merlon("federation", "remove", "other.test")
	read(http.MethodGet, first)
	isOut("ok")
	second := e.invite(t, "partner.test") // not accepted yet
	if h := healthOf(t, e.Domain, "partner.test"); h.Out != "ok" {
		t.Errorf("when another token was made: %+v; want what was seen to stay", h)
	}
	isOut("late")
	_, stderr, err := e.Try("federation", "status")
	if codeOf(err) != 3 || !strings.Contains(stderr, "partner.test: ours was fetched there at") || !strings.Contains(stderr, "every 10s") {
		t.Errorf("late: %v, %s; want exit code 3, and why", err, stderr)
	}
	read(http.MethodGet, first)
	isOut("ok")
	read(http.MethodGet, second)
	isOut("ok")
}

// Wherever a partner sends the CA that follows it, nothing within is asked, be it called
// by address or by name; a cloud's metadata service is not asked for an operator either
// (T40). Here all these addresses answer.
func TestPartnersReachNothingWithin(t *testing.T) {
	if !stage.InNamespace(t) {
		return
	}
	var hits atomic.Int64
	listen := func(address string) (port string) {
		t.Helper()
		lis, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lis.Close() })
		go func() {
			for {
				conn, err := lis.Accept()
				if err != nil {
					return
				}
				hits.Add(1)
				conn.Close()
			}
		}()
		_, port, err = net.SplitHostPort(lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return port
	}
	var within []string
	for _, address := range []string{"169.254.169.254", "127.0.0.1", "::1", "10.1.2.3", "192.168.1.1", "100.64.0.1", "fd00::1"} {
		add := []string{"address", "replace", address, "dev", "lo"}
		if strings.Contains(address, ":") {
			add = append(add, "nodad") // it can be used at once
		}
		if out, err := exec.CommandContext(t.Context(), "ip", add...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		within = append(within, net.JoinHostPort(address, listen(address)))
	}
	_, port, _ := strings.Cut(within[1], ":")
	_, metadata, _ := strings.Cut(within[0], ":")
	within = append(within, "localhost:"+port, "[::ffff:127.0.0.1]:"+port, "[::ffff:169.254.169.254]:"+metadata)

	shop, p := stage.CAAlone(t, "", nil), startPartner(t, "partner.test")
	p.followedBy(shop)
	for _, address := range within {
		p.publish(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+address+"/latest/meta-data", http.StatusFound)
		})
		if _, stderr, err := shop.Try("federation", "refresh", "partner.test"); err == nil || !strings.Contains(stderr, "not of the internet") && !strings.Contains(stderr, "no address of a bundle endpoint") {
			t.Errorf("sent to %s: %v, %s", address, err, stderr)
		}
		if h := healthOf(t, shop, "partner.test"); h.In != "failing" || h.Sequence != 1 {
			t.Errorf("sent to %s: %+v; want the last trust bundle to stay", address, h)
		}
	}
	for _, address := range []string{"169.254.169.254:" + metadata, "[::ffff:169.254.169.254]:" + metadata} {
		_, stderr, err := shop.Try("federation", "follow", "other.test", "--profile", "https_web", "--url", "https://"+address+"/", "--web-ca", p.webCA)
		if err == nil || !strings.Contains(stderr, "no address of a bundle endpoint") {
			t.Errorf("told to ask %s: %v, %s", address, err, stderr)
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d connections to what is within", n)
	}
	if conn, err := net.Dial("tcp", within[0]); err != nil { // it would have been noticed
		t.Errorf("nobody listens: %v", err)
	} else {
		conn.Close()
	}
}

// One address cannot fill the public endpoint, which anybody may come to.
func TestOneAddressDoesNotFillThePublicEndpoint(t *testing.T) {
	t.Parallel()
	e := withEndpointAlone(t)
	reads := func(host string) error {
		dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}}
		transport := &http.Transport{DialContext: dialer.DialContext, TLSClientConfig: &tls.Config{RootCAs: stage.Roots(t, e.files.CA)}}
		t.Cleanup(transport.CloseIdleConnections) // and no sooner: it stays connected
		resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get(e.url("/v1/trust/bundle"))
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		return err
	}
	const most = 64
	for i := range most {
		if err := reads("127.0.0.1"); err != nil {
			t.Fatalf("connection %d: %v", i+1, err)
		}
	}
	if err := reads("127.0.0.1"); err == nil {
		t.Errorf("connection %d of one address was served", most+1)
	}
	if err := reads("127.0.0.2"); err != nil {
		t.Errorf("another address: %v", err)
	}
}

// withEndpointAlone is a CA with a bundle endpoint, and without an agent.
func withEndpointAlone(t *testing.T, settings ...string) endpoint {
	t.Helper()
	e := endpoint{files: stage.Certify(t, t.TempDir(), "127.0.0.1"), address: fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))}
	e.Domain = stage.CAAlone(t, "", nil, append(settings,
		fmt.Sprintf("bundle_endpoint: {address: '%s', cert_file: '%s', key_file: '%s'}", e.address, e.files.Cert, e.files.Key))...)
	return e
}

// invite invites td, and gives the URL in the token.
func (e endpoint) invite(t *testing.T, td string) string {
	t.Helper()
	token := e.Merlon("federation", "invite", td, "--profile", "https_web", "--url", e.url("/v1/trust/bundle"), "--web-ca", e.files.CA)
	return tokenOf(t, token).URL
}

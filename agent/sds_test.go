// SDS over the public socket, by a client of both dialects that sees every
// field. A real Envoy is in integration/envoy/sds_test.go.

package agent_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
)

const (
	web     = "spiffe://" + td + "/web"
	more    = "spiffe://" + td + "/more"
	secrets = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// sdsClient calls like Envoy: without the Workload API's header.
func (n *node) sdsClient(t testing.TB) (secretv3.SecretDiscoveryServiceClient, context.Context) {
	t.Helper()
	cc, _ := conn(t, n.socket)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return secretv3.NewSecretDiscoveryServiceClient(cc), ctx
}

// exchange is a stream of either dialect, read ahead.
type exchange[Req, Resp any] struct {
	t    testing.TB
	send func(Req) error
	got  chan Resp
	err  chan error
}

func newExchange[Req, Resp any](t testing.TB, send func(Req) error, recv func() (Resp, error)) *exchange[Req, Resp] {
	x := &exchange[Req, Resp]{t: t, send: send, got: make(chan Resp, 16), err: make(chan error, 1)}
	go func() {
		for {
			m, err := recv()
			if err != nil {
				x.err <- err
				return
			}
			x.got <- m
		}
	}()
	return x
}

func (x *exchange[Req, Resp]) say(req Req) {
	x.t.Helper()
	if err := x.send(req); err != nil {
		x.t.Fatal(err)
	}
}

func (x *exchange[Req, Resp]) next() (m Resp) {
	x.t.Helper()
	select {
	case m = <-x.got:
	case err := <-x.err:
		x.t.Fatalf("the stream ended: %v", err)
	case <-time.After(30 * time.Second):
		x.t.Fatal("no answer")
	}
	return m
}

// silent expects no answer for a while.
func (x *exchange[Req, Resp]) silent(why string) {
	x.t.Helper()
	select {
	case m := <-x.got:
		x.t.Fatalf("%s is answered: %v", why, m)
	case err := <-x.err:
		x.t.Fatalf("%s ends the stream: %v", why, err)
	case <-time.After(300 * time.Millisecond):
	}
}

func (n *node) stateStream(t testing.TB) *exchange[*discoveryv3.DiscoveryRequest, *discoveryv3.DiscoveryResponse] {
	t.Helper()
	c, ctx := n.sdsClient(t)
	s, err := c.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return newExchange(t, s.Send, s.Recv)
}

func (n *node) deltaStream(t testing.TB) *exchange[*discoveryv3.DeltaDiscoveryRequest, *discoveryv3.DeltaDiscoveryResponse] {
	t.Helper()
	c, ctx := n.sdsClient(t)
	s, err := c.DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return newExchange(t, s.Send, s.Recv)
}

func ask(names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, TypeUrl: secrets, ResourceNames: names}
}

// reply is what Envoy says about an answer: problem is empty if it took it.
func reply(to *discoveryv3.DiscoveryResponse, problem string, names ...string) *discoveryv3.DiscoveryRequest {
	req := &discoveryv3.DiscoveryRequest{TypeUrl: secrets, ResourceNames: names, VersionInfo: to.VersionInfo, ResponseNonce: to.Nonce}
	if problem != "" {
		req.VersionInfo, req.ErrorDetail = "", &statuspb.Status{Code: int32(codes.InvalidArgument), Message: problem}
	}
	return req
}

// named are the secrets in resources, which must have these names.
func named(t testing.TB, resources []*anypb.Any, names ...string) map[string]*tlsv3.Secret {
	t.Helper()
	all, got := map[string]*tlsv3.Secret{}, []string{}
	for _, r := range resources {
		secret := &tlsv3.Secret{}
		if err := r.UnmarshalTo(secret); err != nil {
			t.Fatal(err)
		}
		all[secret.Name] = secret
		got = append(got, secret.Name)
	}
	slices.Sort(names)
	if !slices.Equal(got, names) {
		t.Fatalf("secrets = %q; want %q", got, names)
	}
	return all
}

func parts(resources []*discoveryv3.Resource) (all []*anypb.Any) {
	for _, r := range resources {
		all = append(all, r.Resource)
	}
	return all
}

// keyPair reads an X509-SVID as Envoy does.
func keyPair(t testing.TB, secret *tlsv3.Secret) *x509.Certificate {
	t.Helper()
	c := secret.GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("%s: %v", secret.GetName(), err)
	}
	return pair.Leaf
}

// validator is the trust bundle for td in a secret that uses the SPIFFE
// validator.
func validator(t testing.TB, secret *tlsv3.Secret) []byte {
	t.Helper()
	custom := secret.GetValidationContext().GetCustomValidatorConfig()
	config := &tlsv3.SPIFFECertValidatorConfig{}
	if err := custom.GetTypedConfig().UnmarshalTo(config); err != nil || custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("%s: validator %q, %v", secret.GetName(), custom.GetName(), err)
	}
	if secret.GetValidationContext().GetTrustedCa() != nil || len(config.GetTrustDomains()) != 1 || config.GetTrustDomains()[0].GetName() != td {
		t.Fatalf("%s = %v; want trust domain %s alone", secret.GetName(), config, td)
	}
	return config.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func TestSDSNames(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	c, ctx := n.sdsClient(t)
	own := "spiffe://" + td
	m, err := c.FetchSecrets(ctx, ask("default", more, "ROOTCA", "ALL", own))
	if err != nil {
		t.Fatal(err)
	}
	all := named(t, m.Resources, "default", more, "ROOTCA", "ALL", own)
	for name, id := range map[string]string{"default": web, more: more} {
		if leaf := keyPair(t, all[name]); leaf.URIs[0].String() != id {
			t.Errorf("%s is %s; want %s", name, leaf.URIs[0], id)
		}
	}
	for _, name := range []string{"ROOTCA", "ALL", own} {
		if got := validator(t, all[name]); !bytes.Equal(got, pemOf(ca.Root.Cert)) {
			t.Errorf("%s = %s; want the root", name, got)
		}
	}

	// Every name that is a SPIFFE ID.
	if m, err = c.FetchSecrets(ctx, ask()); err != nil {
		t.Fatal(err)
	}
	named(t, m.Resources, own, web, more)

	// Without the SPIFFE validator.
	for what, value := range map[string]*structpb.Value{"true": structpb.NewBoolValue(true), `"true"`: structpb.NewStringValue("true")} {
		req := ask("ROOTCA", "ALL")
		req.Node.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": value}}
		if m, err = c.FetchSecrets(ctx, req); err != nil {
			t.Fatal(err)
		}
		context := named(t, m.Resources, "ROOTCA")["ROOTCA"].GetValidationContext()
		if context.GetCustomValidatorConfig() != nil || !bytes.Equal(context.GetTrustedCa().GetInlineBytes(), pemOf(ca.Root.Cert)) {
			t.Errorf("opted out by %s: %v; want the root as plain trusted_ca", what, context)
		}
		if len(m.ResourceErrors) != 1 || m.ResourceErrors[0].ResourceName.GetName() != "ALL" {
			t.Errorf("resource_errors = %v; want one, for ALL", m.ResourceErrors)
		}
	}
}

// The header that keeps tricked callers out of the Workload API is not asked of
// Envoy; that opens nothing else.
func TestSDSNeedsNoHeaderAndOpensNothingElse(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	ctx = metadata.NewOutgoingContext(ctx, nil)
	if _, err := secretv3.NewSecretDiscoveryServiceClient(cc).FetchSecrets(ctx, ask("default")); err != nil {
		t.Errorf("FetchSecrets() without the header = %v", err)
	}
	for call, err := range everyRPC(ctx, cc) {
		if call != "ValidateJWTSVID" && status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s without the header, on the same connection: %v; want InvalidArgument", call, err)
		}
	}
	if err := cc.Invoke(ctx, "/envoy.service.secret.v3.SecretDiscoveryServiceX/FetchSecrets", ask(), &discoveryv3.DiscoveryResponse{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("another service: %v; want Unimplemented", err)
	}
}

func TestStateOfTheWorld(t *testing.T) {
	ca := fakeca.New(t, td)
	log := &logBuffer{}
	cfg := newConfig(t, ca)
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	n := start(t, cfg)
	n.waitReady(t)
	s := n.stateStream(t)

	// A name that stands for nothing does not end the stream.
	s.say(ask(web, "ROOTCA"))
	m := s.next()
	if named(t, m.Resources); len(m.ResourceErrors) != 2 {
		t.Errorf("resource_errors = %v; want one for each name", m.ResourceErrors)
	}
	s.say(reply(m, "", web, "ROOTCA"))
	s.silent("an acknowledgement")

	// And stands for something later.
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	for {
		if m = s.next(); len(m.Resources) == 2 {
			break // the trust bundle may come before the SVID
		}
	}
	before := keyPair(t, named(t, m.Resources, web, "ROOTCA")[web])

	// A refusal is logged, and of another answer than the last it is none.
	s.say(reply(m, "bad certificate, says Envoy", web, "ROOTCA"))
	stale := reply(m, "an old story", "default")
	stale.ResponseNonce = "999"
	s.say(stale)
	s.silent("a refusal")
	eventually(t, "the refusal is logged", func() bool {
		return log.have("Envoy refused secrets") && log.have("bad certificate, says Envoy")
	})
	if log.have("an old story") {
		t.Error("a refusal of another answer was taken for one of the last")
	}

	// The next version is sent all the same.
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: web}})
	next := s.next()
	if after := keyPair(t, named(t, next.Resources, web, "ROOTCA")[web]); after.SerialNumber.Cmp(before.SerialNumber) == 0 || next.VersionInfo == m.VersionInfo || next.Nonce == m.Nonce {
		t.Errorf("version %s, nonce %s, serial %x after %s, %s, %x; want new ones", next.VersionInfo, next.Nonce, after.SerialNumber, m.VersionInfo, m.Nonce, before.SerialNumber)
	}

	// Fewer names are no news, more are.
	s.say(reply(next, "", "ROOTCA"))
	s.silent("a name less")
	s.say(reply(next, "", "ROOTCA", "default"))
	named(t, s.next().Resources, "ROOTCA", "default")

	// What is taken away is in no answer any more.
	ca.DeleteEntry("e1")
	if m = s.next(); len(m.Resources) != 0 {
		t.Errorf("after the entry was deleted: %v", m)
	}
}

func TestDelta(t *testing.T) {
	ca := fakeca.New(t, td)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.deltaStream(t)
	subscribe := func(names ...string) *discoveryv3.DeltaDiscoveryRequest {
		return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: secrets, ResourceNamesSubscribe: names}
	}
	first := subscribe(web, "ROOTCA")
	first.InitialResourceVersions = map[string]string{"ROOTCA": "1"}
	s.say(first)
	m := s.next()
	if named(t, parts(m.Resources)); !slices.Equal(m.RemovedResources, []string{"ROOTCA", web}) {
		t.Errorf("removed = %q; want both names", m.RemovedResources)
	}
	s.say(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: m.Nonce})
	s.silent("an acknowledgement")

	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	got := map[string]string{}
	for len(got) < 2 {
		m = s.next()
		for _, r := range m.Resources {
			got[r.Name] = r.Version
		}
	}
	if got["ROOTCA"] != "1" || got[web] == "" {
		t.Errorf("versions = %v; want that of the trust bundle, and a serial number", got)
	}

	// Asked for again is answered again; not asked for any more is not.
	s.say(subscribe("ROOTCA"))
	named(t, parts(s.next().Resources), "ROOTCA")
	s.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"ROOTCA"}, ResourceNamesSubscribe: []string{"default"}})
	named(t, parts(s.next().Resources), "default") // only what is new is sent
	sequence := ca.RaiseTrust()
	s.silent("a trust bundle that is not asked for")
	eventually(t, "it holds nobody up", func() bool { return ca.LastAck().GetTrustBundleSequence() == sequence })
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	s.silent("an entry that is not asked for")
	ca.DeleteEntry("e1")
	m = s.next()
	for len(m.RemovedResources) == 0 {
		m = s.next() // default is /more now
	}
	if !slices.Equal(m.RemovedResources, []string{web}) {
		t.Errorf("removed = %q; want %s", m.RemovedResources, web)
	}

	// Another stream goes on from what the caller has.
	kept := n.deltaStream(t)
	first = subscribe("ROOTCA", more)
	first.InitialResourceVersions = map[string]string{"ROOTCA": strconv.FormatUint(sequence, 10)}
	kept.say(first)
	named(t, parts(kept.next().Resources), more)
}

// No X509-SVID is made that nobody asks for.
func TestOnlySecretsThatAreAskedForAreMade(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.stateStream(t)
	for _, step := range []struct {
		names  []string
		signed int
	}{{[]string{"ROOTCA"}, 0}, {[]string{more}, 1}, {[]string{"default", more}, 2}} {
		s.say(ask(step.names...))
		for len(s.next().Resources) != len(step.names) {
		}
		if _, _, signed := ca.Counts(); signed != step.signed {
			t.Errorf("asked for %q: %d X509-SVIDs were signed; want %d", step.names, signed, step.signed)
		}
	}
}

// Whoever asks for everything hears of new and lost SPIFFE IDs.
func TestEveryName(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.deltaStream(t)
	s.say(&discoveryv3.DeltaDiscoveryRequest{})
	seen := map[string]bool{}
	for !seen[web] || !seen["spiffe://"+td] {
		for _, r := range s.next().Resources {
			seen[r.Name] = true
		}
	}
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	named(t, parts(s.next().Resources), more)
	ca.DeleteEntry("e1")
	if m := s.next(); !slices.Equal(m.RemovedResources, []string{web}) {
		t.Errorf("removed = %q; want %s", m.RemovedResources, web)
	}
}

func TestFetchSecretsIsRefusedLikeTheWorkloadAPI(t *testing.T) {
	ca := fakeca.New(t, td)
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	c, ctx := n.sdsClient(t)
	_, err := c.FetchSecrets(ctx, ask("default"))
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	eventually(t, "the entry is there", func() bool {
		m, err := c.FetchSecrets(ctx, ask("default", "nobody"))
		return err == nil && len(m.Resources) == 1 && len(m.ResourceErrors) == 1
	})
	for what, req := range map[string]*discoveryv3.DiscoveryRequest{
		"another type":       {TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"},
		"too many names":     ask(numbers(1100)...),
		"names that are big": ask(strings.Repeat("x", 70<<10)),
	} {
		if _, err := c.FetchSecrets(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want InvalidArgument", what, err)
		}
	}
}

func numbers(n int) (names []string) {
	for i := range n {
		names = append(names, strconv.Itoa(i))
	}
	return names
}

// logBuffer keeps a log.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) have(text string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Contains(b.text.String(), text)
}

// An expired SVID is not sent, to nobody is said that it is gone, and nobody is
// told that he has no identity, because the CA does not sign.
func TestExpiredSVIDIsNotSent(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(2*time.Second, time.Hour)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.deltaStream(t)
	s.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{web}})
	held := keyPair(t, named(t, parts(s.next().Resources), web)[web])
	ca.FailSign(status.Error(codes.Unavailable, "not now"))
	for {
		m, err := 0, error(nil)
		select {
		case answer := <-s.got: // signed before it failed
			m = len(answer.Resources)
			held = keyPair(t, named(t, parts(answer.Resources), web)[web])
		case err = <-s.err:
		case <-time.After(time.Until(held.NotAfter) + 500*time.Millisecond):
		}
		if err != nil {
			t.Fatalf("the stream ended: %v", err)
		}
		if m == 0 {
			break
		}
	}
	late := n.stateStream(t)
	late.say(ask(web, "ROOTCA"))
	named(t, late.next().Resources, "ROOTCA")
	late.silent("an SVID that nobody signs")
	c, ctx := n.sdsClient(t)
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if m, err := c.FetchSecrets(ctx, ask(web)); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("FetchSecrets() = %v, %v; want it to be held", m, err)
	}
	ca.FailSign(nil)
	if leaf := keyPair(t, named(t, parts(s.next().Resources), web)[web]); leaf.NotAfter.Before(time.Now()) {
		t.Error("an expired SVID was sent")
	}
}

func TestSecretsAreHeldUntilFirstSync(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.HoldSync(true)
	n := start(t, newConfig(t, ca))
	s := n.stateStream(t)
	s.say(ask("nobody", web))
	s.silent("a name of which the agent knows nothing yet")
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	ca.HoldSync(false)
	for len(s.next().Resources) == 0 {
	}
}

func TestTrustBundleIsAcknowledgedWhenEnvoysHaveIt(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	s := n.stateStream(t)
	s.say(ask("ROOTCA"))
	before := s.next()
	sequence := ca.RaiseTrust()
	if after := s.next(); after.VersionInfo != strconv.FormatUint(sequence, 10) || after.VersionInfo == before.VersionInfo {
		t.Errorf("version = %s after %s; want %d", after.VersionInfo, before.VersionInfo, sequence)
	}
	eventually(t, "the new trust bundle is acknowledged", func() bool { return ca.LastAck().GetTrustBundleSequence() == sequence })
}

func TestOneUserCannotOpenSDSStreamsWithoutEnd(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	var refused error
	for range 11 { // connections, because one holds at most 1000 streams
		c, ctx := n.sdsClient(t)
		for range 100 {
			s, err := c.DeltaSecrets(ctx)
			if err == nil {
				if err = s.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}}); err == nil {
					_, err = s.Recv()
				}
			}
			if err != nil && refused == nil { // later ones may be refused for their rate
				refused = err
			}
		}
	}
	wantError(t, refused, codes.ResourceExhausted, "TOO_MANY_STREAMS")
}

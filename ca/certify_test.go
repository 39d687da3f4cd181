// A replica's next intermediate, over the wire: with its own SVID, from the
// root holder.

package ca

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
)

// onStage is the configuration of a CA on e.
func onStage(t *testing.T, e *stage.Etcd) Config {
	t.Helper()
	dir := stage.Dir(t)
	return Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", Logger: slog.New(slog.DiscardHandler),
		Store: config.Etcd, EtcdEndpoints: e.Endpoints(), EtcdCAFile: e.Files.CA, EtcdCertFile: e.Files.Cert, EtcdKeyFile: e.Files.Key,
	}
}

// serving opens a CA and serves with it until the test ends.
func serving(t *testing.T, cfg Config) (*Server, *parts) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.serve(ctx, p, l) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, p.close()); err != nil {
			t.Error(err)
		}
	})
	<-s.Ready()
	return s, p
}

func TestReplicaRenewsOverTheWire(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	s, root := serving(t, onStage(t, e))
	token, err := attest.CreateReplicaToken(t.Context(), root.store, root.keys, "ca-2", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	cfg := onStage(t, e)
	cfg.JWTAlgorithm = "RS256" // each replica makes its own JWT key
	cfg.JoinAddress, cfg.JoinToken, cfg.RootHash = s.Address().String(), token, svid.KeyHash(root.keys.X509().Root)
	_, p := serving(t, cfg)
	first, now := p.keys.X509().ID(), time.Now()
	if err := p.renewIntermediate(t.Context(), now.Add(11*time.Hour)); err != nil || p.keys.X509().ID() != first {
		t.Fatalf("before half life: %v", err)
	}
	if err := p.renewIntermediate(t.Context(), now.Add(13*time.Hour)); err != nil {
		t.Fatal(err)
	}
	second := p.keys.X509().ID()
	rec, ok := root.registry.Replica("ca-2")
	if second == first || !ok || rec.Current().ID != second || !rec.Holds(first) {
		t.Errorf("authority %s after %s; record %+v", second, first, rec)
	}
	// From now on it shows an SVID of the new one.
	if err := p.own.renew(t.Context(), now); err != nil {
		t.Fatal(err)
	}

	// An authority of its is revoked: it gets no more, and keeps what it has.
	put, _, err := revocation.Put(0, svid.Revocation{AuthorityID: first, ExpiresAt: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	root.put(t, put)
	err = p.renewIntermediate(t.Context(), now.Add(26*time.Hour))
	if status.Code(err) != codes.PermissionDenied || p.keys.X509().ID() != second {
		t.Errorf("with a revoked authority: %v, authority %s; want it refused", err, p.keys.X509().ID())
	}
}

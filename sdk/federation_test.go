// Peers of another trust domain: each is verified by the trust bundle of its own,
// the policy names it, and the end of the trust cuts it off.

package sdk_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid/forge"
)

func TestPolicyNamesCallersOfAnotherTrustDomain(t *testing.T) {
	td := sdktest.New(t)
	partner := td.Partner("partner.test")
	orders, web, eve := td.Workload("orders"), partner.Workload("web"), partner.Workload("eve")
	td.Allow(partner.ID("web").String(), "orders")
	td.Allow("web", "orders") // the same path here gives nobody there anything, and the other way round
	server := httptest.NewUnstartedServer(httpauth.Handler(orders, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, _ := sdk.PeerFromContext(r.Context())
		io.WriteString(w, caller.ID.String())
	})))
	server.TLS = orders.ServerTLS()
	server.StartTLS()
	defer server.Close()
	call := func(id *sdk.Identity, to sdk.Target) (string, error) {
		client := httpauth.Client(id, to)
		defer client.CloseIdleConnections()
		resp, err := client.Get(server.URL)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return string(text), err
	}
	if got, err := call(web, sdk.ID(td.ID("orders").String())); err != nil || got != "spiffe://partner.test/web" {
		t.Errorf("an allowed caller: %q, %v", got, err)
	}
	var denied *sdk.DeniedError
	if got, err := call(eve, sdk.ID(td.ID("orders").String())); !errors.As(err, &denied) || denied.Reason != policy.NoGrant {
		t.Errorf("another of that trust domain: %q, %v; want NO_GRANT", got, err)
	}
	// A service is looked for in the own trust domain.
	if got, err := call(web, sdk.Service("orders")); err == nil {
		t.Errorf("spiffe://partner.test/orders was expected, and %q answered", got)
	}
}

// X17, T21: both trust bundles are there, and neither vouches for the other's names.
func TestTrustBundleVouchesForItsOwnTrustDomainOnly(t *testing.T) {
	td := sdktest.New(t)
	partner := td.Partner("partner.test")
	orders := td.Workload("orders")
	stranger := forge.New(t, "partner.test")
	address := listen(t, orders)
	td.Allow(partner.ID("web").String(), "orders")
	td.Allow(td.ID("web").String(), "orders")
	try := func(cert tls.Certificate) error {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 1))
		return err
	}
	for name, test := range map[string]struct {
		cert tls.Certificate
		good bool
	}{
		"the partner's, by the partner":  {certificate(partner.SVID("web")), true},
		"ours, by us":                    {certificate(td.SVID("web")), true},
		"the partner's, by us":           {certificate(td.SVID(partner.ID("web").String())), false},
		"ours, by the partner":           {certificate(partner.SVID(td.ID("web").String())), false},
		"the partner's, by a stranger":   {stranger.Leaf("/web").Certificate(), false},
		"a third trust domain's, by us":  {certificate(td.SVID("spiffe://third.test/web")), false},
		"a third one's, by the partner":  {certificate(partner.SVID("spiffe://third.test/web")), false},
		"below the partner's, by itself": {certificate(partner.SVID("spiffe://sub.partner.test/web")), false},
	} {
		if err := try(test.cert); (err == nil) != test.good {
			t.Errorf("%s: %v; want it let in = %t", name, err, test.good)
		}
	}
}

func TestEndOfTrustCutsLiveConnections(t *testing.T) {
	for name, end := range map[string]func(td, partner *sdktest.TD){
		"federation removed":           func(td, partner *sdktest.TD) { td.Distrust(partner) },
		"the partner's root withdrawn": func(_, partner *sdktest.TD) { partner.RemoveRoot() },
	} {
		t.Run(name, func(t *testing.T) {
			td := sdktest.New(t)
			partner := td.Partner("partner.test")
			third := td.Partner("third.test")
			orders, web, other := td.Workload("orders"), partner.Workload("web"), third.Workload("web")
			td.Allow(partner.ID("web").String(), "orders")
			td.Allow(third.ID("web").String(), "orders")
			address := listen(t, orders)
			dial := func(id *sdk.Identity) (net.Conn, error) {
				conn, err := id.DialTLS(sdk.ID(td.ID("orders").String()))(t.Context(), "tcp", address)
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				return conn, err
			}
			conn, err := dial(web)
			if err != nil {
				t.Fatal(err)
			}
			stays, err := dial(other)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []net.Conn{conn, stays} {
				if err := echoOnce(c); err != nil {
					t.Fatal(err)
				}
			}
			end(td, partner)
			conn.SetReadDeadline(time.Now().Add(30 * time.Second))
			if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				t.Fatalf("Read = %d, %v; want the connection cut", n, err)
			}
			if err := echoOnce(stays); err != nil {
				t.Errorf("a connection of another trust domain was cut, too: %v", err)
			}
			if name != "federation removed" {
				return
			}
			if _, err := orders.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("partner.test")); err == nil {
				t.Error("its trust bundle is still there")
			}
			again, err := dial(web)
			if err == nil {
				err = echoOnce(again)
			}
			if err == nil {
				t.Error("a new connection is let in")
			}
			td.Trust(partner)
			eventually(t, "trusted again", func() bool {
				again, err := dial(web)
				return err == nil && echoOnce(again) == nil
			})
		})
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func echoOnce(conn net.Conn) error {
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

func certificate(s *x509svid.SVID) tls.Certificate {
	cert := tls.Certificate{PrivateKey: s.PrivateKey}
	for _, c := range s.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert
}

// The two sides: Merlon and SPIRE, each a server and an agent that has joined it, as
// they are started by default. What a benchmark does to one it does to the other by
// the same functions.

package spire_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

const trustDomain = "shop.test"

// side is one of the two.
type side struct {
	name          string
	server, agent int // processes
	workloadAPI   string
	node          string // the SPIFFE ID of the agent
	// create registers path on a node, for processes of a user.
	create func(ctx context.Context, node, path string, uid int) (entryID string, err error)
	remove func(ctx context.Context, entryID string) error
	// join proves one more node, as an agent does, and gives its SPIFFE ID and what has
	// X509-SVIDs issued for its entries, in one call.
	join func(b *testing.B) (node string, sign signer)
}

type signer func(ctx context.Context, orders []order) error

// order is of one X509-SVID. Each has a key of its own, as agents make them: Merlon
// takes none for two identities.
type order struct {
	entryID string
	csr     []byte
}

// sides starts both; without SPIRE's programs there is nothing to compare with.
func sides(b *testing.B) []*side {
	b.Helper()
	programs := programsOf(b)
	return []*side{startMerlon(b), startSPIRE(b, programs)}
}

func startMerlon(b *testing.B) *side {
	b.Helper()
	d := stage.SeparateOf(b, trustDomain, "agent_issue_rate: 1000000")
	admin := capb.NewAdminClient(local(b, d.Admin))
	stage.Eventually(b, "the agent is attested", func() error {
		resp, err := admin.ListAgents(b.Context(), &capb.ListAgentsRequest{})
		if err == nil && len(resp.GetAgents()) != 1 {
			err = fmt.Errorf("%d agents", len(resp.GetAgents()))
		}
		return err
	})
	return &side{
		name: "merlon", server: d.CA.PID(), agent: d.Agent.PID(), workloadAPI: d.WorkloadAPI, node: d.AgentID(),
		create: func(ctx context.Context, node, path string, uid int) (string, error) {
			resp, err := admin.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: &capb.Entry{
				SpiffeId: d.ID(path), ParentId: node, Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}},
			}})
			return resp.GetEntry().GetEntryId(), err
		},
		remove: func(ctx context.Context, entryID string) error {
			_, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: entryID})
			return err
		},
		join: func(b *testing.B) (string, signer) {
			token := d.Token()
			key, csr := newKey(b)
			resp, err := capb.NewNodeClient(remote(b, d.GRPC, nil, nil)).Attest(b.Context(), &capb.AttestRequest{
				Evidence: &capb.AttestRequest_JoinToken{JoinToken: token.Token}, Csr: csr,
			})
			if err != nil {
				b.Fatal(err)
			}
			node := capb.NewNodeClient(remote(b, d.GRPC, resp.GetX509Svid(), key))
			return token.AgentID, func(ctx context.Context, orders []order) error {
				req := &capb.SignRequest{}
				for _, o := range orders {
					req.Items = append(req.Items, &capb.SignItem{EntryId: o.entryID, Csr: o.csr})
				}
				resp, err := node.Sign(ctx, req)
				for _, r := range resp.GetResults() {
					if r.GetCode() != 0 {
						return fmt.Errorf("sign: %s", r.GetMessage())
					}
				}
				return err
			}
		},
	}
}

// local is a connection to a socket of this machine.
func local(b *testing.B, path string) *grpc.ClientConn {
	b.Helper()
	return connect(b, "unix:"+strings.TrimPrefix(path, "unix://"), unixsock.ClientCredentials())
}

// remote is a connection to a server as an agent, or as nobody yet. Whom it reaches is
// not looked at: it has just been started here.
func remote(b *testing.B, address string, chain [][]byte, key *ecdsa.PrivateKey) *grpc.ClientConn {
	b.Helper()
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
	if key != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	}
	return connect(b, "passthrough:///"+address, credentials.NewTLS(cfg))
}

func connect(b *testing.B, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	b.Helper()
	cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cc.Close() })
	return cc
}

func newKey(b *testing.B) (key *ecdsa.PrivateKey, csr []byte) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		b.Fatal(err)
	}
	return key, csr
}

// What every command shares: output format, and the connection to a CA or an
// agent.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

const (
	defaultCAAdmin    = "/run/merlon/ca/admin.sock"
	defaultAgentAdmin = "/run/merlon/agent/admin/admin.sock"
)

// options are the flags of every command.
type options struct {
	output string
	admin  string
	ca     string
	// tokenFile and rootHash are for those who have no SVID.
	tokenFile, rootHash string
}

func (o *options) register(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVarP(&o.output, "output", "o", "table", "output format: table or json")
	f.StringVar(&o.admin, "admin", os.Getenv("MERLON_ADMIN"), "admin socket (default $MERLON_ADMIN, then "+defaultCAAdmin+")")
	f.StringVar(&o.ca, "ca", "", "CA address host:port: administer over the network with the SVID from SPIFFE_ENDPOINT_SOCKET, or with --token-file")
	f.StringVar(&o.tokenFile, "token-file", os.Getenv("MERLON_TOKEN_FILE"), "with --ca: file with an OIDC token, in place of an SVID (default $MERLON_TOKEN_FILE)")
	f.StringVar(&o.rootHash, "root-hash", os.Getenv("MERLON_ROOT_HASH"), "with --token-file: SHA-256 of the CA root's public key, as 'merlon trust show' prints it; two with a comma while one root replaces another (default $MERLON_ROOT_HASH)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return o.checkFlags(cmd, f) }
}

// checkText names the argument that no message can carry; gRPC would only say
// that some field cannot be encoded.
func checkText(args []string) error {
	for i, arg := range args {
		if utf8.ValidString(arg) {
			continue
		}
		flag := "the argument"
		if i > 0 && strings.HasPrefix(args[i-1], "-") {
			flag = args[i-1]
		}
		return usageError{fmt.Sprintf("%s %q is not valid UTF-8", flag, arg), "merlon -h lists the commands; each shows its flags with -h"}
	}
	return nil
}

// withCA calls do with a connection to the CA.
func (o *options) withCA(ctx context.Context, do func(capb.AdminClient) error) error {
	if o.ca != "" {
		return o.withRemoteCA(ctx, do)
	}
	return o.withSocket(defaultCAAdmin, "merlon-ca", func(cc *grpc.ClientConn) error {
		return do(capb.NewAdminClient(cc))
	})
}

// withAgent calls do with a connection to this node's agent.
func (o *options) withAgent(do func(agentpb.DebugClient) error) error {
	return o.withSocket(defaultAgentAdmin, "merlon-agent", func(cc *grpc.ClientConn) error {
		return do(agentpb.NewDebugClient(cc))
	})
}

func (o *options) withSocket(path, daemon string, do func(*grpc.ClientConn) error) error {
	if o.admin != "" {
		path = o.admin
	}
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(unixsock.ClientCredentials(socketOwner(path)...)))
	if err != nil {
		return err
	}
	defer cc.Close()
	err = do(cc)
	switch status.Code(err) {
	case codes.Unavailable:
		reason := plainReason(status.Convert(err).Message())
		hint := "is it running? name its admin socket with --admin PATH or MERLON_ADMIN; `merlon dev` starts a trust domain here"
		if reason == syscall.EACCES.Error() {
			hint = "call as root or as the user of " + daemon + ", or have admin_uids in its configuration name you"
		}
		return hintError{fmt.Errorf("reach %s at %s: %s", daemon, path, reason), hint}
	case codes.Unimplemented:
		return hintError{
			fmt.Errorf("%s is not the admin socket of %s", path, daemon),
			"name the right one with --admin PATH or MERLON_ADMIN",
		}
	}
	return err
}

// plainReason is what the system said, out of gRPC's account of how it came to
// ask: "connection error: desc = \"transport: … dial unix PATH: connect: no
// such file or directory\"".
func plainReason(message string) string {
	if _, reason, ok := strings.Cut(message, "connect: "); ok {
		return strings.TrimSuffix(reason, `"`)
	}
	return message
}

// socketOwner trusts, besides root and the own user, the owner of the
// socket's directory: whoever reached an admin socket passed its 0700
// directory, which nobody but that owner could have made.
func socketOwner(path string) []uint32 {
	if uid, ok := unixsock.DirOwner(path); ok {
		return []uint32{uid}
	}
	return nil
}

// fetchTimeout is how long the agent may take to name an identity. It answers
// at once, but while its own first sync with the CA is pending.
const fetchTimeout = 10 * time.Second

// fetchOwn asks the agent once who this process is.
func fetchOwn(ctx context.Context) (*workloadapi.X509Context, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	own, err := workloadapi.FetchX509Context(ctx)
	if err == nil {
		return own, nil
	}
	hint := "set SPIFFE_ENDPOINT_SOCKET to the agent's socket"
	if status.Code(err) == codes.PermissionDenied {
		hint = "this program has no registration entry: merlon entry create --role operator --selector unix:path:…, on the CA's host"
	}
	return nil, hintError{fmt.Errorf("get an SVID from the Workload API: %s", plainReason(status.Convert(err).Message())), hint}
}

// withRemoteCA administers over the network with the SVID of an entry that has a
// role, or with a token.
func (o *options) withRemoteCA(ctx context.Context, do func(capb.AdminClient) error) error {
	if o.tokenFile != "" {
		return o.withToken(do)
	}
	own, err := fetchOwn(ctx)
	if err != nil {
		return err
	}
	defaultSVID := own.DefaultSVID()
	caID, err := spiffeid.FromSegments(defaultSVID.ID.TrustDomain(), "ca")
	if err != nil {
		return err
	}
	config := svid.TLS{SVIDs: defaultSVID, Bundles: own.Bundles, Admit: func(p *svid.Peer) error {
		if p.ID != caID {
			return fmt.Errorf("%s is %s, not the CA %s", o.ca, p.ID, caID)
		}
		return nil
	}}
	cc, err := grpc.NewClient(o.ca, grpc.WithTransportCredentials(credentials.NewTLS(config.Client())))
	if err != nil {
		return err
	}
	defer cc.Close()
	err = do(capb.NewAdminClient(cc))
	if _, hinted := errors.AsType[hintError](err); !hinted && status.Code(err) == codes.PermissionDenied && hintOfRefusal(status.Convert(err)) == "" {
		return hintError{err, fmt.Sprintf("the role of %s is that of its registration entry: merlon entry create --role …, on the CA's host", defaultSVID.ID)}
	}
	return err
}

var errNoAgent = errors.New("no agent is attested yet")

// onlyAgent returns the SPIFFE ID of the only agent there is.
func onlyAgent(ctx context.Context, ca capb.AdminClient) (string, error) {
	resp, err := ca.ListAgents(ctx, &capb.ListAgentsRequest{})
	if err != nil {
		return "", err
	}
	switch agents := resp.GetAgents(); len(agents) {
	case 0:
		return "", hintError{errNoAgent, "merlon token create prints what a new agent needs"}
	case 1:
		return agents[0].GetSpiffeId(), nil
	default:
		return "", usageError{fmt.Sprintf("there are %d agents: say under which one with --parent", len(agents)), "merlon agent list shows them"}
	}
}

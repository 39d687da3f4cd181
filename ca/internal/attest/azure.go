// Azure: a token of the identity that Azure assigned to a virtual machine, in
// which it says which machine that is.

package attest

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/oidc"
)

// AzureKind is the kind of evidence in an agent's record.
const AzureKind = "azure"

// AzureIssuer and AzureKeysURL are where the tokens of a tenant come from.
func AzureIssuer(tenant string) string { return "https://sts.windows.net/" + tenant + "/" }

// AzureKeysURL is where the keys of a tenant's issuer are.
func AzureKeysURL(tenant string) string {
	return "https://login.microsoftonline.com/" + tenant + "/discovery/keys"
}

// Azure proves virtual machines of one tenant. It is safe for concurrent use.
type Azure struct {
	TrustDomain spiffeid.TrustDomain
	Tenant      string
	// Subscriptions are whose machines are nodes.
	Subscriptions []string
	// Source verifies tokens of AzureIssuer(Tenant).
	Source *oidc.Source
}

// machine is a virtual machine as xms_mirid names it; what else has an identity
// there is none, and one that a user made can be that of many.
var machine = regexp.MustCompile(`^/subscriptions/([^/]+)/resourcegroups/([^/]+)/providers/microsoft\.compute/virtualmachines/([^/]+)$`)

// Prove says which machine's the token is.
func (a *Azure) Prove(ctx context.Context, token string, now time.Time) (*Node, error) {
	claims, err := instanceClaims(ctx, AzureKind, a.Source, token, now)
	if err != nil {
		return nil, err
	}
	if claims["tid"] != a.Tenant {
		return nil, refused(AzureKind, NotAllowed, "the token is of another tenant than node_attestors.azure.tenant")
	}
	// Azure's names are the same in capitals.
	m := machine.FindStringSubmatch(strings.ToLower(text(claims, "xms_mirid")))
	if m == nil {
		return nil, refused(AzureKind, NotProved, "the token names no virtual machine: give the machine a system-assigned identity, and ask for its token")
	}
	subscription, group, name := m[1], m[2], m[3]
	if !slices.Contains(a.Subscriptions, subscription) {
		return nil, refused(AzureKind, NotAllowed, "subscription %.100q is not among node_attestors.azure.subscriptions", subscription)
	}
	id, err := entry.AttestedID(a.TrustDomain, AzureKind, subscription, group, name)
	if err != nil {
		return nil, refused(AzureKind, NotAllowed, "resource group %.100q and machine %.100q cannot be a node's name: each has to be a path segment of a SPIFFE ID", group, name)
	}
	f := facts{kind: AzureKind}
	f.add("tenant", a.Tenant)
	f.add("subscription", subscription)
	f.add("resource-group", group)
	f.add("vm-name", name)
	return (&Node{ID: id, Kind: AzureKind, Selectors: f.list}).once([]byte(token), endOf(claims)), nil
}

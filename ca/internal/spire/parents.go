// Parents: SPIRE's agents and node aliases, and which agents and aliases they are
// here.

package spire

import (
	"fmt"
	"strings"
)

const (
	serverPath = "/spire/server"
	agentPath  = "/spire/agent/"
	aliasPath  = "/agent/alias/"
)

// split cuts a SPIFFE ID into trust domain and path.
func split(id string) (td, path string) {
	rest := strings.TrimPrefix(id, "spiffe://")
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		return rest[:i], rest[i:]
	}
	return rest, ""
}

// parent is what an entry's parent is here.
type parent struct {
	id   string // SPIFFE ID here
	note string // what has to be done for it, if anything
	lost string // why there is none
}

// parents knows them by their SPIFFE IDs at SPIRE.
type parents map[string]parent

// of is what id is here. The error says why it is nothing.
func (p parents) of(id string) (parent, error) {
	if known, ok := p[id]; ok {
		if known.lost != "" {
			return parent{}, fmt.Errorf("parent %s: %s", id, known.lost)
		}
		return known, nil
	}
	td, path := split(id)
	name, ok := strings.CutPrefix(path, agentPath)
	if !ok {
		return parent{}, fmt.Errorf("parent %s is neither an agent nor an alias of nodes that the entries make: if it is a node here, say --parent %s", id, Word(id+"=spiffe://"+td+"/agent/NAME"))
	}
	kind, rest, _ := strings.Cut(name, "/")
	agent := "spiffe://" + td + "/agent/"
	switch segments := strings.Count(rest, "/") + 1; {
	case kind == "join_token" && segments == 1 && rest != "":
		return parent{agent + rest, fmt.Sprintf("its node joins under that name by: merlon token create --agent %s", Word(rest)), ""}, nil
	case kind == "k8s_psat" && segments == 2:
		return parent{id: agent + "k8s/" + rest}, nil
	case kind == "aws_iid" && segments == 3:
		return parent{id: agent + "aws/" + rest}, nil
	case kind == "gcp_iit" && segments == 2:
		return parent{id: agent + "gcp/" + rest}, nil
	}
	return parent{}, fmt.Errorf("parent %s: SPIRE's name of this node does not say what it is called here: when it has joined (merlon agent list), say --parent %s", id, Word(id+"=spiffe://"+td+"/agent/NAME"))
}

// alias says what the node alias e is here: an alias, or with a join token's, the one
// agent that it stands for. made is false where no entry is needed for it.
func (p parents) alias(e *shown) (ours parent, made bool, err error) {
	td, path := split(e.spiffeID)
	if path == "" {
		return parent{}, false, fmt.Errorf("%s has no path", e.spiffeID)
	}
	if len(e.selectors) == 1 && e.selectors[0].Type == "spiffe_id" {
		ours, err = p.of(e.selectors[0].Value)
		return ours, false, err
	}
	return parent{id: "spiffe://" + td + aliasPath + path[1:]}, true, nil
}

// isAlias says whether e maps nodes: its parent is the server, or the one agent that
// it selects.
func (e *shown) isAlias() bool {
	td, path := split(e.parentID)
	own, _ := split(e.spiffeID)
	return td == own && path == serverPath ||
		len(e.selectors) == 1 && e.selectors[0].Type == "spiffe_id" && e.selectors[0].Value == e.parentID
}

// SPIRE's configuration files, in HCL or JSON, as a tree of settings of which each
// remembers its line, and whether anything was made of it: what nobody took is named.

package spire

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/ast"
	hclstrconv "github.com/hashicorp/hcl/hcl/strconv"
	"github.com/hashicorp/hcl/hcl/token"
)

// Limits of a configuration file: HCL's parser calls itself for each bracket.
const (
	maxConfigBytes = 1 << 20
	maxBrackets    = 20_000
)

// setting is a key with values, or with settings below it.
type setting struct {
	key    string
	line   int
	values []string
	below  []*setting
	taken  bool
}

// readConfig reads a file. HCL's scanner panics where it finds itself wrong; that is
// an error here.
func readConfig(file string, data []byte) (root *setting, err error) {
	defer func() {
		if r := recover(); r != nil {
			root, err = nil, fmt.Errorf("read %s: HCL's parser gives up: %s", file, printable(fmt.Sprint(r)))
		}
	}()
	if len(data) > maxConfigBytes || strings.Count(string(data), "{")+strings.Count(string(data), "[") > maxBrackets {
		return nil, fmt.Errorf("read %s: it has more than %d bytes, or %d brackets", file, maxConfigBytes, maxBrackets)
	}
	tree, err := hcl.ParseBytes(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %s", file, printable(err.Error()))
	}
	root = &setting{}
	if err := root.fill(tree.Node); err != nil {
		return nil, fmt.Errorf("read %s: %s", file, printable(err.Error()))
	}
	return root, nil
}

// fill takes in what is written at n.
func (s *setting) fill(n ast.Node) error {
	switch n := n.(type) {
	case *ast.LiteralType:
		text, err := literal(n.Token)
		s.values = append(s.values, text)
		return err
	case *ast.ListType:
		for _, item := range n.List {
			if err := s.fill(item); err != nil {
				return err
			}
		}
	case *ast.ObjectType:
		return s.fill(n.List)
	case *ast.ObjectList:
		for _, item := range n.Items {
			at := s
			for _, key := range item.Keys {
				text, err := literal(key.Token)
				if err != nil {
					return err
				}
				at = at.child(text, key.Pos().Line)
			}
			if err := at.fill(item.Val); err != nil {
				return err
			}
		}
	default:
		return errors.New("there is something that is neither value nor block")
	}
	return nil
}

// child is a block that may be written several times, or a value.
func (s *setting) child(key string, line int) *setting {
	if c := s.at(key); c != nil {
		return c
	}
	c := &setting{key: key, line: line}
	s.below = append(s.below, c)
	return c
}

// literal is a token's text without quotes.
func literal(t token.Token) (string, error) {
	if t.Type != token.STRING {
		return t.Text, nil
	}
	unquote := hclstrconv.Unquote
	if t.JSON {
		unquote = strconv.Unquote
	}
	if t.Text == "" { // null
		return "", nil
	}
	text, err := unquote(t.Text)
	if err != nil {
		return "", fmt.Errorf("line %d: %s is no string", t.Pos.Line, t.Text)
	}
	return text, nil
}

// at is the setting below by its keys; nil where there is none.
func (s *setting) at(keys ...string) *setting {
	for _, key := range keys {
		if s == nil {
			return nil
		}
		i := slices.IndexFunc(s.below, func(c *setting) bool { return c.key == key })
		if i < 0 {
			return nil
		}
		s = s.below[i]
	}
	return s
}

// take is the value of a setting, of which something is made; empty where it is not
// there.
func (s *setting) take(keys ...string) string {
	values := s.takeAll(keys...)
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}

func (s *setting) takeAll(keys ...string) []string {
	c := s.at(keys...)
	if c == nil {
		return nil
	}
	c.taken = true
	return c.values
}

// takeWhole takes all that is below.
func (s *setting) takeWhole() {
	if s == nil {
		return
	}
	s.taken = true
	for _, c := range s.below {
		c.takeWhole()
	}
}

// leftover calls do for each setting that nobody took.
func (s *setting) leftover(path string, do func(path string, s *setting)) {
	for _, c := range s.below {
		below := strings.TrimPrefix(path+"."+c.key, ".")
		if !c.taken && (len(c.values) > 0 || len(c.below) == 0) {
			do(below, c)
		}
		c.leftover(below, do)
	}
}
